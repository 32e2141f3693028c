"""What happens to each page when the site is built.

Formulas become MathML, so that a page needs no script and no font to show them. Names in docstrings lose the role in
front of them (``:func:`name```), which is Sphinx's way and would be shown as it stands.
"""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=<code>|<a )")


def on_page_content(content: str, **_: object) -> str:
    r"""Convert each ``\(..\)`` (in a line) and ``\[..\]`` (a block) that arithmatex has marked; drop the roles."""
    return ROLE.sub("", FORMULA.sub(_to_mathml, content))


def _to_mathml(match: re.Match[str]) -> str:
    display = "block" if match["open"] == "[" else "inline"
    mathml = convert(html.unescape(match["latex"]).strip(), display=display)
    return f'<div style="overflow-x: auto">{mathml}</div>' if display == "block" else mathml
