"""Checkpoints for pages, and a parser of pages that raises where tags do not nest."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import torch

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "a\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}evil",
    "{{ 7 * 7 }}{% raw %}",
    "</style></script><b>bold",
    "<!-- <script>",
    "http://example.invalid/x.js",
    "../../../etc/passwd",
    "]]>&lt;&#x3c;",
    "x" * 450,
]
VOID = {"meta", "link", "br", "img", "input", "hr", "wbr", "rect", "line", "path", "circle"}
EXPECTED_TAGS = set(
    re.findall(
        r"\w+",
        """html head meta link title style body a header p dl div dt dd main section h1 h2 h3 table caption thead tbody
    tr th td sup b svg g rect line path circle text nav ul li figure figcaption span details summary button form label
    input select option output small wbr code footer script""",
    )
)


def update(source: dict[str, torch.Tensor], size: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: (v.float() + size * torch.randn(v.shape, generator=generator)).to(v.dtype) for k, v in source.items()}


def model(layers: int, dtype: torch.dtype = torch.bfloat16, hidden: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layers)
    shapes = {"model.embed_tokens.weight": (90, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{p}_proj.weight": (hidden, hidden) for p in ("gate", "up", "down")}
    return {name: (0.03 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


class Element(dict):
    def __missing__(self, key):
        assert key == "text"
        return "".join(self["parts"])


class Page(HTMLParser):
    """Elements in order, with attributes and text; raises where tags do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[Element] = []
        self.elements: list[Element] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, [e["tag"] for e in self.open]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> names an attribute twice"
        element = Element(tag=tag, attrs=dict(attrs), parts=[], parents=[e["attrs"].get("id") for e in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag=tag, attrs=dict(attrs), parts=[], parents=[]))

    def handle_endtag(self, tag):
        assert tag not in VOID or self.open[-1]["tag"] != tag
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["parts"].append(data)

    def handle_comment(self, data):
        self.comments.append(data)

    def all(self, tag: str, **attrs: str) -> list[dict]:
        return [e for e in self.elements if e["tag"] == tag and all(e["attrs"].get(k) == v for k, v in attrs.items())]

    def section(self, id: str) -> str:
        return next(e["text"] for e in self.all("section", id=id))


def assert_self_contained(page: Page) -> None:
    """The page loads nothing, has no inline handlers, and its policy allows only its own script and style."""
    assert {e["tag"] for e in page.elements} <= EXPECTED_TAGS
    assert not page.comments
    for element in page.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on")
            assert name not in ("src", "style", "srcset", "action", "formaction", "xlink:href")
            if name == "href":
                assert value.startswith("#") or value == "data:,"
    (script,), (style,) = page.all("script"), page.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["attrs"]["content"]
    for element in (script, style):
        digest = base64.b64encode(hashlib.sha256(element["text"].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def rows_of(page: Page, table: str) -> tuple[list[str], list[list[dict]]]:
    cells = [e for e in page.elements if e["tag"] in ("td", "th") and table in e["parents"]]
    heads = [e["text"] for e in cells if "aria-sort" in e["attrs"]]
    body = [e for e in cells if e["attrs"].get("scope") == "row" or (e["tag"] == "td" and "colspan" not in e["attrs"])]
    return heads, [body[i : i + len(heads)] for i in range(0, len(body), len(heads))]
