"""The generation expert of one pipeline on the understanding branch of another.

    python examples/ablation/graft.py --generation runs/ablation/edits/pipeline \\
        --understanding runs/ablation/seed0/all/stage1/pipeline --output_dir runs/ablation/seed0/all/zero

Stage I neither reads nor changes the generation expert. So Stage I of a base that knows general edits is Stage I of the
plain base, to the bit, with that generation expert beside it: what has been trained once need not be trained again.
"""

import argparse
from pathlib import Path

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.loading_synermedgen import part_of


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", type=Path, required=True, help="pipeline whose generation expert is taken")
    parser.add_argument("--understanding", type=Path, required=True, help="pipeline whose other parts are taken")
    parser.add_argument("--output_dir", type=Path, required=True, help="the result is OUTPUT_DIR/pipeline")
    return parser.parse_args(argv)


def main(args):
    pipe, other = (
        SynerMedGenPipeline.from_pretrained(path, dtype="float32", print_report=False)
        for path in (args.generation, args.understanding)
    )
    taken = {name: tensor for name, tensor in other.model.state_dict().items() if part_of(name) != "generation"}
    unexpected = pipe.model.load_state_dict(taken, strict=False).unexpected_keys
    if unexpected:
        raise SystemExit(f"{args.understanding} has other parts than {args.generation}: {', '.join(unexpected[:3])}.")
    pipe.model.config.trained_tasks = other.model.config.trained_tasks
    pipe.model.config.label_images = other.model.config.label_images
    pipe.save_pretrained(args.output_dir / "pipeline")
    print(f"Saved {args.output_dir / 'pipeline'}")


if __name__ == "__main__":
    main(parse_args())
