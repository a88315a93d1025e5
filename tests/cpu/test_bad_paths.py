"""A model's folder cannot make a reader look outside it: names with .., absolute paths, links."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoConfig

from vllm_flatquant import files
from vllm_flatquant.calibration import export
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.reference import load_reference, read_spec
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.errors import CheckpointError
from vllm_flatquant.files import check_files, file_inside, stored_tensors
from vllm_flatquant.spec import parse_spec

from .tiny_checkpoint import Recipe, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "q", Recipe(layers=1))
    return tmp_path / "q"


def refused_everywhere(folder, match):
    """The plugin's check and the reference backend both refuse the folder with that message."""
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=match) as plugin:
        check_files(
            folder, parse_spec(config["quantization_config"]), AutoConfig.from_pretrained(folder)
        )
    with pytest.raises(UserError, match=match) as reference:
        load_reference(folder)
    assert str(plugin.value) == str(reference.value)
    assert "\n" not in str(plugin.value)


NAMES = ["../out.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a/../b", "~/x"]


@pytest.mark.parametrize("name", NAMES)
def test_index_cannot_name_a_file_elsewhere(checkpoint, tmp_path, name):
    (checkpoint / "sub").mkdir()
    save_file({}, tmp_path / "out.safetensors")
    save_file({}, checkpoint / "sub" / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_everywhere(checkpoint, "points outside its folder|which its index lists")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800"])
def test_index_cannot_name_what_is_no_file_name(checkpoint, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_everywhere(checkpoint, "is no usable file name|which its index lists")


def test_a_file_that_may_not_be_read_is_not_called_damaged(checkpoint, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(files, "safe_open", lambda *_: (_ for _ in ()).throw(FileNotFoundError("no")))
    refused = r"model\.safetensors cannot be read \(Permission denied\); correct its permissions"
    with pytest.raises(CheckpointError, match=refused):
        stored_tensors(checkpoint)
    monkeypatch.setattr(Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Permission denied\)"):
        file_inside(checkpoint, "config.json")


def move_and_link(file, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    file.symlink_to(os.path.relpath(target, file.parent))


def test_weights_cannot_be_a_link_elsewhere(checkpoint, tmp_path):
    move_and_link(checkpoint / "model.safetensors", tmp_path / "elsewhere" / "model.safetensors")
    refused_everywhere(checkpoint, "'model.safetensors' points outside its folder; copy the file there")


def test_a_link_to_itself_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("model.safetensors")
    refused_everywhere(checkpoint, "model.safetensors")


def test_index_cannot_be_a_link_elsewhere(checkpoint, tmp_path):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}')
    move_and_link(index, tmp_path / "index.json")
    refused_everywhere(checkpoint, "index.json' points outside its folder")


def test_config_cannot_be_a_link_elsewhere(checkpoint, tmp_path):
    move_and_link(checkpoint / "config.json", tmp_path / "config.json")
    for read in (read_spec, load_reference, ModelSource):
        with pytest.raises(UserError, match="'config.json' points outside its folder"):
            read(checkpoint)


def test_links_inside_the_folder_are_fine(checkpoint, tmp_path):
    move_and_link(checkpoint / "model.safetensors", checkpoint / "parts" / "weights")
    load_reference(checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)  # the folder itself may be one
    load_reference(tmp_path / "link")


def test_links_of_the_hugging_face_cache_are_fine(checkpoint, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    for name in ("model.safetensors", "config.json"):
        move_and_link(snapshot / name, tmp_path / "models--org--name" / "blobs" / f"{name}-hash")
    load_reference(snapshot)


def test_private_files_cannot_slip_into_a_checkpoint_through_links(checkpoint, tmp_path):
    (tmp_path / "secret").write_text("key")
    (checkpoint / "tokenizer.json").symlink_to(tmp_path / "secret")
    spec = read_spec(checkpoint)
    with pytest.raises(UserError, match="'tokenizer.json' points outside its folder"):
        export.write_checkpoint(tmp_path / "out", False, [], checkpoint, {}, spec)
    assert not (tmp_path / "out").exists()


def test_file_inside_returns_plain_names(checkpoint):
    assert file_inside(checkpoint, "config.json") == checkpoint / "config.json"
    assert file_inside(checkpoint, "absent") == checkpoint / "absent"
    assert set(stored_tensors(checkpoint)) > {"lm_head.weight"}
