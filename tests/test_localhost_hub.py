"""The Hub that other tests push to and pull from: the real clients must not be able to tell it from the real one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from localhost_hub import LocalhostHub

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def hub():
    with LocalhostHub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("lab/model")
    return api


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\nlibrary_name: diffusers\n---\n# A model\n")
    (folder / "unet" / "config.json").write_text('{"layers": 2}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_what_is_pushed_comes_back_byte_for_byte(hub, api, folder, tmp_path, repo_type):
    api.create_repo("lab/thing", repo_type=repo_type)
    api.upload_folder(repo_id="lab/thing", repo_type=repo_type, folder_path=folder)
    assert len(uploads(hub)) == 1  # the weights; small text is part of the commit

    options = {"repo_type": repo_type, "endpoint": hub.url, "token": hub.token, "local_dir": tmp_path / "pulled"}
    snapshot_download("lab/thing", **options, ignore_patterns=".gitattributes")
    pulled = {path: data for path, data in read(tmp_path / "pulled").items() if not path.startswith(".cache/")}
    assert pulled == read(folder)
    assert hub.files("lab/thing", repo_type) == pulled | {".gitattributes": hub.files("lab/model")[".gitattributes"]}


def test_repos_are_created_once_and_deleted_for_good(hub, api):
    assert api.whoami()["name"] == "tester"
    assert api.create_repo("lab/model", exist_ok=True).repo_id == "lab/model"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("lab/model")
    api.delete_repo("lab/model")
    assert not api.repo_exists("lab/model")


def test_listings_give_sizes_and_tell_lfs_from_regular_files(api, folder):
    commit = api.upload_folder(repo_id="lab/model", folder_path=folder)

    info = api.model_info("lab/model", files_metadata=True)
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings}
    assert info.sha == commit.oid and info.library_name == "diffusers" and info.card_data.license == "mit"
    assert sizes["model.safetensors"] == (len(WEIGHTS), True) and sizes["unet/config.json"] == (13, False)

    names = {entry.path for entry in api.list_repo_tree("lab/model")}
    assert names == {".gitattributes", "README.md", "model.safetensors", "unet"}
    tree = {entry.path: entry for entry in api.list_repo_tree("lab/model", recursive=True, expand=True)}
    assert tree["unet/config.json"].last_commit.oid == commit.oid != tree[".gitattributes"].last_commit.oid
    (weights,) = api.get_paths_info("lab/model", ["model.safetensors", "absent"])
    assert weights.lfs.sha256 == tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert [commit.title for commit in api.list_repo_commits("lab/model")][1:] == ["initial commit"]


def test_a_commit_stays_what_it_was(hub, api, tmp_path):
    upload = {"path_in_repo": "config.json", "repo_id": "lab/model"}
    first = api.upload_file(path_or_fileobj=b"1", **upload)
    api.create_tag("lab/model", tag="v1")
    api.create_branch("lab/model", branch="next")
    api.upload_file(path_or_fileobj=b"2", **upload, parent_commit=first.oid)

    for revision, content in {first.oid: b"1", first.oid[:8]: b"1", "v1": b"1", "next": b"1", "main": b"2"}.items():
        path = api.hf_hub_download("lab/model", "config.json", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content == hub.files("lab/model", revision=revision)["config.json"]
    refs = api.list_repo_refs("lab/model")
    assert {ref.name: ref.target_commit == first.oid for ref in refs.branches + refs.tags} == {
        "main": False,
        "next": True,
        "v1": True,
    }
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"3", **upload, parent_commit=first.oid)
    with pytest.raises(HfHubHTTPError, match="no pull requests"):
        api.upload_file(path_or_fileobj=b"3", **upload, create_pr=True)


def test_files_and_folders_are_deleted(hub, api, folder):
    api.upload_folder(repo_id="lab/model", folder_path=folder)
    operations = [CommitOperationDelete("unet/"), CommitOperationDelete("README.md")]
    api.create_commit("lab/model", operations, commit_message="Tidy up")
    assert set(hub.files("lab/model")) == {".gitattributes", "model.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("README.md", "lab/model")


def test_content_the_hub_has_is_not_sent_again(hub, api, folder):
    first = api.upload_folder(repo_id="lab/model", folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id="lab/model", folder_path=folder).oid == first.oid
    assert not any(path.endswith("/commit/main") for _, path in hub.requests)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id="lab/model")
    assert not uploads(hub) and hub.files("lab/model")["copy.safetensors"] == WEIGHTS


def test_what_is_absent_is_named(hub, api, tmp_path):
    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path}
    for kind, repo, name, revision in [
        (RepositoryNotFoundError, "lab/absent", "config.json", "main"),
        (RevisionNotFoundError, "lab/model", ".gitattributes", "absent"),
        (RemoteEntryNotFoundError, "lab/model", "config.json", "main"),
    ]:
        with pytest.raises(kind):
            hf_hub_download(repo, name, revision=revision, **options)
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("lab/model")  # a model is no dataset of the same name
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("lab/model", "absent"))


def test_only_the_token_may_write(hub, api):
    api.create_repo("lab/private", private=True)
    for token, status, private in [("hf_wrong", 401, 401), (hub.read_token, 403, None), (False, 401, 401)]:
        with pytest.raises(HfHubHTTPError) as error:
            api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="lab/model", token=token)
        assert error.value.response.status_code == status
        if private:
            with pytest.raises(HfHubHTTPError):
                api.model_info("lab/private", token=token)
        else:
            assert api.model_info("lab/private", token=token).private
    assert set(hub.files("lab/model")) == {".gitattributes"}


def test_a_card_is_checked_before_anything_is_sent(hub, api):
    for card in ["---\nlicense: [mit]\n---\n", "---\n- a list\n---\n", "---\na: b: c\n---\n"]:
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="lab/model")
    assert "README.md" not in hub.files("lab/model")


def test_a_download_cut_off_leaves_nothing_and_is_resumed(hub, api, tmp_path):
    # The client writes in chunks of this size, and resumes from the last whole one.
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    content = os.urandom(chunk + 200_000)
    api.upload_file(path_or_fileobj=content, path_in_repo="model.safetensors", repo_id="lab/model")
    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path}

    hub.fail_after(chunk + 100_000, then_down=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        hf_hub_download("lab/model", "model.safetensors", **options)
    assert not any(content[:100] == data[:100] for data in read(tmp_path).values())

    hub.down = None
    hub.ranges.clear()
    hub.fail_after(chunk + 100_000)
    path = hf_hub_download("lab/model", "model.safetensors", **options)
    assert Path(path).read_bytes() == content
    assert hub.ranges == [f"bytes={chunk}-"]


def test_an_upload_cut_off_changes_nothing_and_can_be_repeated(hub, api):
    upload = {"path_or_fileobj": WEIGHTS, "path_in_repo": "model.safetensors", "repo_id": "lab/model"}
    hub.fail_after(1000, then_down=410)  # a status with which the client gives up
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        api.upload_file(**upload)
    assert error.value.__cause__.response.status_code == 410 and len(uploads(hub)) == 2
    assert "model.safetensors" not in hub.files("lab/model")
    hub.down = None
    api.upload_file(**upload)
    assert hub.files("lab/model")["model.safetensors"] == WEIGHTS


def test_what_was_pulled_is_used_while_the_hub_is_down(hub, api, tmp_path):
    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path}
    pulled = snapshot_download("lab/model", **options)
    hub.down = 503
    assert snapshot_download("lab/model", **options) == pulled
    with pytest.raises(HfHubHTTPError, match="503"):
        api.model_info("lab/model")


def test_the_environment_is_all_a_process_needs(hub, tmp_path):
    script = """
import sys
hosts = set()
sys.addaudithook(lambda event, args: hosts.add(args[0]) if event == "socket.getaddrinfo" else None)

import datasets
datasets.Dataset.from_dict({"age": [61, 47]}).push_to_hub("lab/patients", split="train")
print(datasets.load_dataset("lab/patients", split="train")["age"][:])
# The second is the data set viewer's address, which datasets derives from the Hub's: nothing has this name.
print(hosts - {"127.0.0.1", "datasets-server.127.0.0.1"})
"""
    environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[61, 47]", "set()"]
    assert {"README.md", "data/train-00000-of-00001.parquet"} < set(hub.files("lab/patients", "dataset"))
