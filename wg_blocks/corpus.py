"""Training examples from texts: a plain text file, or a wiki's XML export.

A text is cut into passages of whole sentences, and the passages into sections; a passage is learned as the answer to
the one before it in its section, and a section is held out or not as a whole, so no text stands on both sides.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wg_blocks.examples import Row
from wg_core.errors import ConfigError, MissingExtraError

WORDS = 70
"""Words of a passage, about; it ends with a paragraph where that makes it at least two thirds of this."""

LETTERS = 6
"""Letters of a word, about, with the space after it."""

SECTION = 5
"""Passages of a section."""

LARGEST_TEXT = 64 * 2**20
LARGEST_EXPORT = 2 * 2**30
LARGEST_PAGE = 2 * 2**20
MOST_PAGES = 20_000
FIRST = "Begin to tell{about}."
NEXT = "So far{about}:\n{before}\nGo on."

_BLANK = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"')\u201d\u2019])\s+|(?<=[。！？])")  # noqa: RUF001


def from_text(file: Path, *, world_id: str, path: str) -> Iterator[Row]:
    """A row, still without `split`, of each passage of a UTF-8 text file, for the block at `path`.

    Paragraphs are parted by blank lines; one that begins with `#` is a heading or a remark and is left out.

    Raises: FileNotFoundError, ConfigError for a text that is too large or no UTF-8.
    """
    if file.stat().st_size > LARGEST_TEXT:
        raise ConfigError(f"{file}: larger than {LARGEST_TEXT} bytes; split it into several files")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: no UTF-8 at byte {error.start}; save it as UTF-8") from None
    found = list(passages(text))
    for number, start in enumerate(range(0, len(found), SECTION)):
        yield from _rows(found[start : start + SECTION], "", number, world_id, path)


def from_wiki(file: Path, *, world_id: str, path: str) -> Iterator[Row]:
    """A row, still without `split`, of each passage of the articles in a MediaWiki XML export; each page is a section.

    Redirects and other name spaces than articles are left out, and so are pages of less than one passage.
    https://www.mediawiki.org/wiki/Help:Export

    Raises: ConfigError for what is no such export or exceeds the limits, MissingExtraError.
    """
    number = 0
    for title, wikitext in pages(file):
        found = list(passages(plain_text(wikitext)))
        if found:
            yield from _rows(found, f" of {title}", number, world_id, path)
            number += 1


def passages(text: str) -> Iterator[str]:
    """Pieces of `text` of about `WORDS` words, each of whole sentences; a last piece under a third of that is left out.

    What has no end of a sentence for long (a list, a table) is cut; letters without spaces count as words of `LETTERS`.
    """
    piece: list[str] = []
    size = 0
    for paragraph in _BLANK.split(text.replace("\r\n", "\n")):
        if paragraph.lstrip().startswith("#"):
            continue
        for sentence in _sentences(" ".join(paragraph.split())):
            words = _words(sentence)
            if piece and size + words > WORDS * 3 // 2:
                yield " ".join(piece)
                piece, size = [], 0
            if words:
                piece.append(sentence)
                size += words
        if size * 3 >= WORDS * 2:
            yield " ".join(piece)
            piece, size = [], 0
    if size * 3 >= WORDS:
        yield " ".join(piece)


def _sentences(paragraph: str) -> Iterator[str]:
    for sentence in _SENTENCE.split(paragraph):
        if _words(sentence) > 4 * WORDS:
            yield from textwrap.wrap(sentence, WORDS * LETTERS)
        else:
            yield sentence


def _words(text: str) -> int:
    return max(len(text.split()), len(text) // (2 * LETTERS))


def _rows(found: list[str], about: str, number: int, world_id: str, path: str) -> Iterator[Row]:
    for before, passage in zip([None, *found[:-1]], found, strict=True):
        asked = FIRST.format(about=about) if before is None else NEXT.format(about=about, before=before)
        yield {
            "world_id": world_id,
            "step": number,
            "stage": path.split("/")[0],
            "path": path,
            "messages": [{"role": "user", "content": asked}],
            "answer": passage,
            "schema": None,
        }


# ---- MediaWiki -------------------------------------------------------------------------------------------------------


def pages(file: Path) -> Iterator[tuple[str, str]]:
    """`(title, wikitext)` of the articles in an export, one at a time; no entity or reference of the file is followed.

    Raises: ConfigError, MissingExtraError.
    """
    try:
        from defusedxml.common import DefusedXmlException
        from defusedxml.ElementTree import ParseError, iterparse
    except ImportError as error:
        raise MissingExtraError(
            "a wiki export needs the extra 'wiki': pip install 'generative-worlds[wiki]'"
        ) from error
    if file.stat().st_size > LARGEST_EXPORT:
        raise ConfigError(f"{file}: larger than {LARGEST_EXPORT} bytes; export fewer pages")
    count, root = 0, None
    try:
        for event, element in iterparse(str(file), events=("start", "end"), forbid_dtd=True):
            name = _local(element)
            if root is None:
                root = element
                if name != "mediawiki":
                    raise ConfigError(f"{file}: the root is <{name}>, not <mediawiki>; give a MediaWiki XML export")
            if event != "end" or name != "page":
                continue
            page = _page(element, file)
            root.clear()
            if page is None:
                continue
            count += 1
            if count > MOST_PAGES:
                raise ConfigError(f"{file}: more than {MOST_PAGES} articles; export fewer pages")
            yield page
    except ParseError as error:
        raise ConfigError(f"{file}: no well-formed XML: {error}") from None
    except DefusedXmlException as error:
        raise ConfigError(
            f"{file}: declares a document type or entities, which an export never does: {error}"
        ) from None


def _page(element: Any, file: Path) -> tuple[str, str] | None:
    parts: dict[str, str] = {}
    for child in element.iter():
        parts[_local(child)] = child.text or ""  # of several revisions, the last one
    if "redirect" in parts or parts.get("ns", "0").strip() != "0":
        return None
    title, text = parts.get("title", "").strip(), parts.get("text", "")
    if len(text) > LARGEST_PAGE:
        raise ConfigError(f"{file}: page {title!r} has more than {LARGEST_PAGE} characters; leave it out of the export")
    return (title, text) if title and text.strip() else None


def _local(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]


_UNREAD = ("ref", "table", "gallery", "math")
_DROPPED = re.compile(r"^(file|image|category|datei|bild|kategorie|файл|категория)\s*:", re.IGNORECASE)


def plain_text(wikitext: str) -> str:
    """The prose of a page: without templates, tables, references, files and headings."""
    try:
        import mwparserfromhell
    except ImportError as error:
        raise MissingExtraError(
            "a wiki export needs the extra 'wiki': pip install 'generative-worlds[wiki]'"
        ) from error
    code = mwparserfromhell.parse(wikitext)
    _leave_out(code)
    return str(code.strip_code(normalize=True, collapse=True))


def _leave_out(code: Any) -> None:
    """Take out what is no prose, also what stands in emphasis and lists; a heading parts paragraphs."""
    from mwparserfromhell.nodes import Heading, Tag, Text, Wikilink

    kept: list[Any] = []
    for node in code.nodes:
        if isinstance(node, Heading):
            kept.append(Text("\n\n"))
        elif isinstance(node, Tag) and str(node.tag).strip().lower() not in _UNREAD:
            _leave_out(node.contents)
            kept.append(node)
        elif not (isinstance(node, Tag) or (isinstance(node, Wikilink) and _DROPPED.match(str(node.title)))):
            kept.append(node)
    code.nodes = kept
