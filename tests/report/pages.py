"""What is true of every page that a report writes."""

import re
from html.parser import HTMLParser

from lora_ggpo.report import page

HOSTILE = "<script>alert(1)</script> & \"q\" 'a' {{ 7 * 7 }} $x_$ | [bold]"


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in order."""

    VOID = ("meta", "path", "use", "rect", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def asks_nothing_of_the_network(text):
    """Check that a page is whole, and that nothing in it names an address."""
    page = Page(text)
    assert page.open == []
    named = {name: value for _, attributes in page.tags for name, value in attributes.items()}
    assert not {"src", "href", "srcset", "action", "data"} & set(named)
    links = [a["xlink:href"] for _, a in page.tags if "xlink:href" in a]
    assert links
    assert all(link.startswith("#") for link in links)
    namespaces = re.compile(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"')
    assert "//" not in re.sub(r"^\s*//.*$", "", namespaces.sub("", text), flags=re.M)
    assert "@import" not in text
    assert re.findall(r"url\((.)", text) == ["#"] * text.count("url(")
    assert "default-src 'none'" in text


def leave_out_pictures(patch):
    """Let reports be written in no time by those who look at their words alone."""
    patch.setattr(page, "render", lambda figure, kind: b"drawn")
    patch.setattr(page, "inline_svg", lambda figure: "<svg></svg>")
