"""The comparison of codecs, run for real at tiny size: both are trained alike and told in the same figures."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples"))


def test_both_codecs_are_trained_and_measured(tmp_path, capsys):
    import compare_codecs

    options = ["--output_dir", tmp_path / "codecs", "--cache_dir", tmp_path / "phantom", "--train_cases", 1]
    options += ["--test_cases", 1, "--slices_per_case", 1, "--block_out_channels", 8, 8, 8, "--max_train_steps", 2]
    compare_codecs.main(compare_codecs.parse_args([str(one) for one in options]))
    results = json.loads((tmp_path / "codecs" / "comparison.json").read_text())["results"]
    assert list(results) == ["plain", "bands"] and all(set(own) == {"CT", "CBCT", "PET"} for own in results.values())
    assert results["plain"]["CT"] != results["bands"]["CT"] and results["plain"]["CT"]["MAE body"] > 0
    assert "| CT, MAE soft (HU) |" in capsys.readouterr().out
    settings = [json.loads((tmp_path / "codecs" / codec / "training_args.json").read_text()) for codec in results]
    differing = {key for key in settings[0] if settings[0][key] != settings[1][key]}
    assert differing == {"codec", "output_dir"}
    with pytest.raises(SystemExit, match="holds a comparison already"):
        compare_codecs.main(compare_codecs.parse_args([str(one) for one in options]))
