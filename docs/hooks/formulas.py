"""Formulas as MathML, made while the site is built, so that no page loads a script for them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

__all__ = ["on_page_content"]

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):<code>(?P<short>~?)(?P<path>[\w.]+)</code>")


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, and Sphinx roles of docstrings into links."""
    return _ROLE.sub(_link, _FORMULA.sub(_mathml, content))


def _mathml(found: re.Match[str]) -> str:
    block = found["tag"] == "div"
    tex = html.unescape(found["tex"]).strip()
    mathml = convert(tex, display="block" if block else "inline")
    # Norm bars are as high as letters; a font may stretch one of a pair and not the other.
    mathml = mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')
    # Letters of a formula say nothing in a list of search results.
    return f'<{found["tag"]} class="formula" data-search-exclude>{mathml}</{found["tag"]}>'


def _link(found: re.Match[str]) -> str:
    path: str = found["path"]
    shown = path.rpartition(".")[2] if found["short"] else path
    if not path.startswith("firsttok."):
        return f"<code>{shown}</code>"
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
