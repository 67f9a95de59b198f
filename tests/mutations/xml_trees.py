"""Mutations of XML: of its elements, and of what stands around them in the text."""

import copy
import re
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from tests.mutations.trees import pick

_TEXTS = (
    *("", " ", "0", "1", "-1", "-5", "7.5", "1e3", "1e309", "nan", "inf", "-inf", "12,5", "0x10"),
    *("1_000", "\u0661\u0662", "9" * 400, "99999999999", "cat", "Cat", "traffic_light", "a  b"),
    *("../../x.jpg", "/etc/passwd", "C:\\a\\b.jpg", "x" * 3000, "\ufeffcat", "\u200b", "e\u0301"),
    *("True", "0/0", "1;2", "<b/>", "None", "unknown", "https://host/a.jpg", "2.jpg", "0.jpg"),
)
_TAGS = (
    "object",
    "name",
    "bndbox",
    "xmin",
    "xmax",
    "size",
    "width",
    "filename",
    "part",
    "x",
    "Object",
)
_PROLOGUES = (
    '<?xml version="1.0" encoding="UTF-8"?>\n',
    '<?xml version="1.0" encoding="latin-1"?>\n',
    '<?xml version="1.0" encoding="utf-16"?>\n',
    '<?xml version="1.0" encoding="gb2312"?>\n',
    '<?xml version="1.0" encoding="klingon"?>\n',
    '<?xml version="1.1"?>\n',
    '\n<?xml version="1.0"?>\n',
    "<!DOCTYPE annotation>\n",
    '<!DOCTYPE annotation SYSTEM "file:///etc/hostname">\n',
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n',
    "<?php system('touch was_run') ?>\n",
    "<!-- a comment -->\n",
)


def mutated(root: Element, rng: np.random.Generator) -> Element:
    """A copy with one random change of an element."""
    root = copy.deepcopy(root)
    elements = [(parent, child) for parent in root.iter() for child in parent]
    if not elements:
        root.text = pick(rng, _TEXTS)
        return root
    parent, child = pick(rng, elements)
    leaves = [(p, c) for p, c in elements if not len(c)]
    kind = pick(
        rng,
        (
            "text",
            "text",
            "text",
            "delete",
            "double",
            "rename",
            "empty",
            "move",
            "attribute",
            "wrap",
            "nudge",
        ),
    )
    if kind in ("text", "nudge"):
        parent, child = pick(rng, leaves)
        child.text = pick(rng, _TEXTS) if kind == "text" else _nudged(child.text or "", rng)
    elif kind == "delete":
        parent.remove(child)
    elif kind == "double":
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(child))
    elif kind == "rename":
        child.tag = pick(rng, (*_TAGS, child.tag.upper(), f"{child.tag}s", f"ns:{child.tag}"))
    elif kind == "empty":
        child.clear()
    elif kind == "move":
        parent.remove(child)
        pick(rng, [e for e in root.iter() if e is not child]).append(child)
    elif kind == "attribute":
        child.set(pick(rng, ("id", "xmin", "xml:lang", "xmlns")), pick(rng, ("1", "", "http://x")))
    else:
        _wrap(parent, child, pick(rng, ("objects", "object", "bndbox", "part")))
    return root


def _nudged(text: str, rng: np.random.Generator) -> str:
    """A number that is a little or much off; other text in another form."""
    try:
        value = float(text)
        whole = int(value)
    except (ValueError, OverflowError):
        return pick(
            rng, (text.upper(), f" {text}\n", text[:-1], text + "\u00a0", text.replace(" ", "_"))
        )
    return str(
        pick(
            rng,
            (-value, value + 0.5, value * 1000, value / 100, whole - 30, f"+{text}", f"{text}px"),
        )
    )


def _wrap(parent: Element, child: Element, tag: str) -> None:
    """An element around another."""
    wrapped = copy.deepcopy(child)
    child.clear()
    child.tag = tag
    child.append(wrapped)


def as_bytes(root: Element) -> bytes:
    return ElementTree.tostring(root, encoding="utf-8")


def mutated_text(content: bytes, rng: np.random.Generator) -> bytes:
    """What no tree can hold: declarations, entities, comments in values, name spaces, depth."""
    kind = pick(
        rng,
        (
            "prologue",
            "prologue",
            "entity",
            "bomb",
            "comment",
            "cdata",
            "namespace",
            "deep",
            "twice",
            "encoded",
        ),
    )
    text = content.decode("utf-8", "replace")
    body = re.sub(r"^<\?xml[^>]*\?>\s*", "", text)
    if kind == "prologue":
        return (pick(rng, _PROLOGUES) + body).encode()
    if kind == "entity":
        return body.replace(
            "<name>", f"<name>{pick(rng, ('&amp;', '&x;', '&#0;', '&#65;', '&#xD800;', '&'))}", 1
        ).encode()
    if kind == "bomb":
        return (_bomb() + body.replace("<name>", "<name>&e9;", 1)).encode()
    if kind == "comment":
        return re.sub(r"(\d)(\d)", r"\1<!-- c -->\2", body, count=int(rng.integers(1, 4))).encode()
    if kind == "cdata":
        return re.sub(r"<name>([^<]*)<", r"<name><![CDATA[\1]]><", body, count=1).encode()
    if kind == "namespace":
        return body.replace("<annotation", '<annotation xmlns="http://x/voc"', 1).encode()
    if kind == "deep":
        depth = int(pick(rng, (50, 2000, 50_000)))
        return body.replace("<object>", "<a>" * depth + "</a>" * depth + "<object>", 1).encode()
    if kind == "twice":
        return (body + body).encode()
    encoding = pick(rng, ("utf-16", "latin-1", "utf-8-sig", "utf-16-be"))
    return body.encode(encoding, "xmlcharrefreplace")


def _bomb() -> str:
    """Entities that expand to a billion letters."""
    lines = ['<!ENTITY e0 "ha">']
    lines += [f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10)]
    return f"<!DOCTYPE annotation [{''.join(lines)}]>"


def element(tag: str, content: dict[str, Any]) -> Element:
    """An element with a child for each entry; a list is as many children of one name."""
    made = Element(tag)
    for key, value in content.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                made.append(element(key, item))
            else:
                ElementTree.SubElement(made, key).text = str(item)
    return made
