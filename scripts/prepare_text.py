#!/usr/bin/env python3
"""Makes one plain text file out of the English text in Debian's package sword-text-web.

    scripts/prepare_text.py ROOT OUTPUT

ROOT is where the package is unpacked ('/' when it is installed on the system; both are tried). The package holds a
public-domain translation of the Bible in modern English, as zlib-compressed books of OSIS markup. Titles, notes
and markup are dropped, paragraphs become lines and the typographic quotes and dashes ASCII. OUTPUT is complete or
absent, and left alone when it is newer than the package. Exit status 1 with a message when the text is not there.
"""
import html
import os
import re
import struct
import sys
import zlib
from pathlib import Path

MODULES = "usr/share/sword/modules/texts/ztext"
MINIMUM_BYTES = 1_000_000
ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--",
                       "\u2026": "...", "\u00a0": " "})


def books(module: Path, testament: str):
    """The books of one testament, decompressed: .bzs holds (offset, size, decompressed size) of each in .bzz."""
    index, data = (module / f"{testament}.bzs").read_bytes(), (module / f"{testament}.bzz").read_bytes()
    for offset, size, full_size in struct.iter_unpack("<III", index[: len(index) // 12 * 12]):
        if size:
            book = zlib.decompress(data[offset : offset + size])
            if len(book) != full_size:
                raise ValueError(f"{module}/{testament}.bzz: a book has {len(book)} bytes instead of {full_size}")
            yield book.decode("utf-8", errors="replace")


def plain(book: str) -> str:
    """The running text of the canonical books in a block; prefaces and glossaries around them are left out."""
    canonical = r'<div\b(?=[^>]*canonical="true")[^>]*\bsID="(\w+)"[^>]*>(.*?)(?=<div\b[^>]*eID="\1"|\Z)'
    texts = re.findall(canonical, book, re.S)
    book = "\n".join(text for _, text in texts)
    book = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", book, flags=re.S)
    book = re.sub(r'<chapter\b[^>]*\bsID=|<(?:div|lg|l|p|lb)\b[^>]*>', lambda tag: "\n" + tag[0], book)
    book = html.unescape(re.sub(r"<[^>]*>", "", book)).translate(ASCII)
    book = book.encode("ascii", errors="ignore").decode()
    lines = (" ".join(line.split()) for line in book.splitlines())
    return "\n".join(line for line in lines if line)


def main(root: Path, output: Path) -> None:
    for base in (root, Path("/")):
        found = sorted((base / MODULES).glob("engWEB*/ot.bzz"))
        if found:
            break
    else:
        raise FileNotFoundError(f"no text of sword-text-web under {root / MODULES} or /{MODULES}")
    module = found[0].parent
    if output.exists() and output.stat().st_mtime > (module / "ot.bzz").stat().st_ctime:
        return
    texts = (plain(book) for testament in ("ot", "nt") for book in books(module, testament))
    text = "\n\n".join(filter(None, texts)) + "\n"
    if len(text) < MINIMUM_BYTES:
        raise ValueError(f"{module} gave only {len(text)} bytes of text; at least {MINIMUM_BYTES} were expected")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_suffix(".partial")
    aside.write_text(text, encoding="ascii")
    os.replace(aside, output)
    print(f"prepare_text: {output} holds {len(text)} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: prepare_text.py ROOT OUTPUT")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError, zlib.error) as error:
        sys.exit(f"prepare_text: error: {error}")
