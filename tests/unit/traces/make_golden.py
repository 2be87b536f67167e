"""Makes `golden-v1.kvt` and `golden-v1.json`: run once when version 1.0 was fixed, and never again.

The file must read the same for ever; its bytes are pinned here by their hash, so that nobody renews it by mistake.
"""

from __future__ import annotations

import json
from pathlib import Path

import generate
import slow_reader

HERE = Path(__file__).parent
SHA256 = "96b5578e50a47581133cd889e10a8f44ab890155a38a8bf3235c39f657a4e6bc"
SETTINGS = generate.Settings(
    seed=1, steps=40, blocks=12, granules=2, outputs_behind=1, full_sets=0.1, big=0.2, wide=0.3, explicit=0.4,
    rare=0.2, arrivals=0.7, frame_commits=9, ids=3, unknown=0.1,
)  # fmt: skip


def main() -> None:
    path = generate.write(SETTINGS, HERE / "golden-v1")[0]
    tables = slow_reader.read([path.read_bytes()])
    (HERE / "golden-v1.json").write_text(json.dumps(tables, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
