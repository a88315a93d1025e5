"""Random damage to config.json and to safetensors headers, and what reads them.

Every case must end in a usable result or in one of our errors, with one sentence; soon; and without taking
memory for sizes that a file only claims. ``fuzz(target, cases)`` runs one target; ``TARGETS`` lists them.
"""

import copy
import json
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.reference import load_reference, read_spec
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.errors import CheckpointError, UnsupportedError
from vllm_flatquant.files import check_files
from vllm_flatquant.spec import SpecError, parse_spec
from vllm_flatquant.tools.convert import convert

from ..cpu.tiny_checkpoint import Recipe, random_model, write_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1] / "cpu"))  # where these import each other
import foreign_folders
from tiny_model import make_model

OURS = (UserError, SpecError, CheckpointError, UnsupportedError)
SLOWEST_SECONDS = 20.0
MOST_MEMORY = 1 << 30
"""Bytes that the process may grow by over a whole run."""

SPECIAL: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4,
        8,
        16,
        31,
        2**31,
        2**63,
        10**30,
        0.5,
        1e308,
        "",
        "4",
        "auto",
    ),
    *([], {}, [[]], [None], "\ud800", "\0", "../x", "a\nb", "x" * 3000, "F32", "I64", "F8_E4M3", "F4"),
    *(float("nan"), float("inf"), {"left": 8, "right": 12}, ["lm_head"], "llama", "qwen3", "mixtral"),
]
_values = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(-(2**70), 2**70),
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything inside a JSON value is."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    found = []
    for key, item in inner:
        found += [(*at, key), *_paths(item, (*at, key))]
    return found


@st.composite
def damaged(draw: Any, value: Any) -> Any:
    """A copy of a JSON object with one to three things replaced, removed, added or copied."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(value)
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "copy"]))
        if change == "replace":
            parent[path[-1]] = copy.deepcopy(draw(_values))
        elif change == "remove":
            del parent[path[-1]]
        elif change == "copy":
            other = draw(st.sampled_from(paths))
            source = value
            for key in other:
                source = source[key]
            parent[path[-1]] = copy.deepcopy(source)
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = copy.deepcopy(draw(_values))
        else:
            parent.append(copy.deepcopy(draw(_values)))
    return value


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


@st.composite
def damaged_weights(draw: Any, file: bytes) -> bytes:
    """A safetensors file with a damaged header, a wrong length, flipped bytes or a missing end."""
    header, data = split(file)
    how = draw(st.sampled_from(["fields", "fields", "fields", "text", "length", "bytes", "cut"]))
    if how == "cut":
        return file[: draw(st.integers(0, len(file) - 1))]
    if how == "bytes":
        out = bytearray(file)
        for _ in range(draw(st.integers(1, 8))):
            out[draw(st.integers(0, len(file) - len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(out)
    text = json.dumps(draw(damaged(header)) if how == "fields" else header)
    if how == "text":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=20)) + text[at + draw(st.integers(0, 20)) :]
    raw = text.encode("utf-8", "surrogatepass")
    length = draw(st.sampled_from([0, 1, 7, len(raw) + 1, 2**31, 2**63, 2**64 - 1, 99_999_999]))
    return struct.pack("<Q", length if how == "length" else len(raw)) + raw + data


_DAMAGED = ("config.json", "model.safetensors")


class Sample:
    """A folder that the cases damage: its config, weights and index as they should be."""

    def __init__(self, folder: Path):
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = (folder / "model.safetensors").read_bytes()
        names = [name for name in split(self.weights)[0] if name != "__metadata__"]
        self.index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        self.readers = KINDS[folder.name]
        self.others = {
            file.name: file.read_bytes()
            for file in folder.iterdir()
            if file.is_file() and file.name not in (*_DAMAGED, "model.safetensors.index.json")
        }

    def write(self, folder: Path, config: Any = None, weights: bytes = b"", index: Any = None) -> None:
        """Write the folder with what is given in place of what should be."""
        for name, content in self.others.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(self.config if config is None else config))
        (folder / "model.safetensors").write_bytes(weights or self.weights)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(self.index if index is None else index)
        )


def make_samples(folder: Path) -> dict[str, Sample]:
    """Tiny folders by kind, made in ``folder``: a checkpoint, an unquantized model, and other tools' ones."""
    recipe = Recipe("Qwen2", layers=1, k_bits=4, v_bits=4)
    write_checkpoint(folder / "checkpoint", recipe)
    random_model(recipe).save_pretrained(folder / "unquantized")
    model = make_model(folder / "model")
    for kind in (foreign_folders.realquant, foreign_folders.squeezebits, foreign_folders.ascend):
        kind(model, folder / kind.__name__)
    return {kind: Sample(folder / kind) for kind in KINDS}


def one_sentence(call: Callable[[], Any]) -> str:
    """ "" if ``call`` returns; else our error's message, which must be one sentence. Others pass through."""
    try:
        call()
    except OURS as error:
        message = str(error)
        assert message.strip() and "\n" not in message.strip(), f"not one sentence: {message!r}"
        assert len(message) < 1500, f"{len(message)} characters: {message[:300]!r}"
        assert "allocate" not in message, f"memory was asked for: {message!r}"
        return message
    return ""


def read_as_plugin(folder: Path) -> None:
    """What vLLM does with a folder before the engine starts, its own part excepted."""
    config = json.loads((folder / "config.json").read_text())
    given = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(given, dict) or given.get("quant_method") != "flatquant":
        return  # vLLM does not ask us
    spec = parse_spec(given)
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # noqa: BLE001 (vLLM's and Transformers' own to explain)
        return
    check_files(folder, spec, hf_config)


def read_as_reference(folder: Path) -> None:
    """Load a folder for the reference backend and run two tokens."""
    model = load_reference(folder)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)


def read_as_source(folder: Path) -> None:
    """What quantize does with a model before it calibrates."""
    ModelSource(folder)


def convert_foreign(folder: Path) -> None:
    """Convert another tool's folder."""
    with tempfile.TemporaryDirectory() as out:
        convert(str(folder), Path(out) / "out", scheme="w4a4", kv=4, golden=False)
        load_reference(Path(out) / "out")


KINDS: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "checkpoint": (read_as_plugin, read_as_reference, read_spec),
    "unquantized": (read_as_source, read_as_reference),
    "realquant": (convert_foreign,),
    "squeezebits": (convert_foreign, read_as_plugin),
    "ascend": (convert_foreign,),
}
"""Kind of folder -> what reads such a folder."""


def fuzz(target: str, samples: dict[str, Sample], cases: int, number: int = 0) -> Counter[str]:
    """Run ``cases`` cases of one target; how many were refused, accepted, and by which reader.

    samples: of ``make_samples``. number: the seed. Raises what a reader raised, with the smallest case that makes it do so.
    """
    seen: Counter[str] = Counter()
    kind, part = target.split()
    sample = samples[kind]
    strategy = {
        "spec": damaged(sample.config.get("quantization_config")),
        "config": damaged(sample.config),
        "header": damaged_weights(sample.weights),
        "index": damaged(sample.index),
    }[part]

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def case(value: Any) -> None:
        seen["cases"] += 1
        start = time.monotonic()
        if part == "spec":
            seen["refused" if one_sentence(lambda: parse_spec(value)) else "accepted"] += 1
        else:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                sample.write(folder, **{{"header": "weights"}.get(part, part): value})
                for reader in sample.readers:
                    refused = one_sentence(lambda reader=reader: reader(folder))  # type: ignore[misc]
                    seen[f"{reader.__name__}: {'refused' if refused else 'accepted'}"] += 1
        taken = time.monotonic() - start
        assert taken < SLOWEST_SECONDS, f"{taken:.0f} s"

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_MEMORY, f"{target}: the process grew by {grown / 1e6:.0f} MB"
    return seen


TARGETS = {
    "checkpoint spec": 0.15,
    "checkpoint config": 0.2,
    "checkpoint header": 0.15,
    "checkpoint index": 0.08,
    "unquantized config": 0.1,
    "unquantized header": 0.08,
    "realquant config": 0.04,
    "realquant header": 0.04,
    "squeezebits config": 0.04,
    "squeezebits header": 0.04,
    "ascend config": 0.04,
    "ascend header": 0.04,
}
"""Kind of folder and what in it is damaged -> its share of the cases."""
