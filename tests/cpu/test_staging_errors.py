"""What to do about an error of the file system fits its number, as Python and as safetensors raise it."""

import errno
import os

import pytest
from safetensors import SafetensorError

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.staging import Staging, block_stage, explained

FIXES = [
    (errno.ENOSPC, "free space"),
    (errno.EDQUOT, "free space or have the quota raised"),
    (errno.EFBIG, "raise the limit on a file's size (ulimit -f, or the file system's)"),
    (errno.EACCES, "change who may use it"),
    (errno.EROFS, "make it writable"),
    (errno.EBUSY, "remove the cause and try again"),
]


@pytest.fixture
def told(tmp_path):
    """The sentence for an error while ``tmp_path / "out"`` is made; finished: blocks that were done before."""

    def told(error, finished=0):
        out = tmp_path / "out"
        with Staging(out) as staging:
            staging.write_run("{}")
            for i in range(finished):
                (staging.folder / block_stage(i)).mkdir()
            with pytest.raises(UserError) as found, explained(out, staging):
                raise error
        return str(found.value)

    return told


@pytest.mark.parametrize(("number", "fix"), FIXES)
def test_what_to_do(told, tmp_path, number, fix):
    out, why = tmp_path / "out", os.strerror(number)
    said = f"{out} cannot be written ({why}); {fix} or choose another --out"
    assert told(OSError(number, why)) == said
    assert told(OSError(number, why, str(tmp_path / ".out.partial" / "x"))) == said
    rust = f"{why} (os error {number})"
    error = SafetensorError(f"Error while serializing: I/O error: {rust}")
    assert told(error) == said.replace(why, rust)
    kept = f"{out} cannot be written ({why}); {fix}; finished blocks are kept for --resume: 2"
    assert told(OSError(number, why), finished=2) == kept


@pytest.mark.parametrize(("number", "fix"), FIXES)
def test_a_file_of_the_model_is_not_taken_for_the_output(told, tmp_path, number, fix):
    read, why = tmp_path / "model" / "config.json", os.strerror(number)
    assert told(OSError(number, why, str(read))) == f"{read} cannot be used ({why}); {fix}"
    copied = OSError(number, why, str(read), None, str(tmp_path / ".out.partial" / "config.json"))
    assert told(copied).startswith(f"{tmp_path / 'out'} cannot be written ({why})")
