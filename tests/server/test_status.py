"""The status page as a browser shows it, and what it may not do."""

import shutil
import subprocess
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
from PIL import Image

from benchmarks.server import sample_value
from benchmarks.tiny_model.language import make_example
from fastkv_vllm.adapter.status import FRESH_S, PATH
from fastkv_vllm.config import CompressionConfig
from tests.server.conftest import MODEL, SETTINGS, client_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NUM_TOKENS, BLOCK_SIZE = 1024, 32
KEPT_COLOUR = (0x0B, 0x5C, 0xAD)  # light theme: where all entries stay


class Tables(HTMLParser):
    """The rows of all tables of a page as lists of cells, and the labels and paths of its drawing."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.text, self.attributes = [], [], [], []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data


def read(server, method="GET"):
    request = urllib.request.Request(server.base_url + PATH, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.headers, response.read().decode()


def browse(server, *flags, size="1100,1500"):
    """What a browser says of the page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
    done = subprocess.run([*command, *flags, server.base_url + PATH], capture_output=True, timeout=60, check=True)
    return done.stdout.decode()


def compress(server, prompt, **arguments):
    """Have a prompt compressed, and wait until no page is older."""
    reply = client_of(server).completions.create(model=MODEL, prompt=prompt, max_tokens=2, **arguments)
    time.sleep(FRESH_S + 0.1)
    return reply


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_what_happened(compressing_server, tmp_path):
    first, second = (make_example("niah", NUM_TOKENS, seed).prompt for seed in (0, 1))
    compress(compressing_server, first)
    other = {"kv_compression": "snapkv", "retention_ratio": 0.25}
    compress(compressing_server, second, extra_body={"vllm_xargs": other})
    page = Tables(browse(compressing_server, "--dump-dom"))
    assert "KV-cache compression is on" in page.text
    samples = compressing_server.metrics()
    for method in ("fastkv", "snapkv"):
        prompts, seen, kept, freed, later = (
            sample_value(samples, f"vllm:fastkv_{name}_total", method=method)
            for name in (
                "requests_compressed",
                "prompt_tokens_seen",
                "prompt_tokens_kept",
                "blocks_freed",
                "decode_blocks_freed",
            )
        )
        figures = [f"{prompts:,.0f}", f"{seen:,.0f}", f"{kept:,.0f}", f"{kept / seen:.1%}", f"{freed:,.0f}"]
        assert [method, *figures, f"{later:,.0f}"] in page.rows
    assert ["retention_ratio", str(SETTINGS["retention_ratio"])] in page.rows
    kept = CompressionConfig("snapkv", retention_ratio=0.25).plan(NUM_TOKENS, BLOCK_SIZE).num_kept
    (last,) = (text for text in page.text if "of them kept per layer and head" in text)
    assert last.startswith(f"snapkv · {NUM_TOKENS:,} tokens, {kept} of them"), last
    assert page.text.count(f"{kept / NUM_TOKENS:.1%}") >= 8, "a share for each layer"

    picture = tmp_path / "page.png"
    browse(compressing_server, f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = dict((colour, count) for count, colour in image.convert("RGB").getcolors(maxcolors=1 << 20))
    # Window and other stretches that stay whole: at least the last one of each head, 6 x 12 pixels.
    assert colours.get(KEPT_COLOUR, 0) > 8 * 2 * 50, "the map is not drawn in its colours"


def test_it_is_read_only_and_stands_alone(compressing_server):
    headers, page = read(compressing_server)
    assert headers["Content-Type"] == "text/html; charset=utf-8" and headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    found = Tables(page)
    assert not {"script", "form", "input", "button", "link", "img", "iframe", "a"}.intersection(found.tags)
    assert not [name for name in found.attributes if name in ("src", "href") or name.startswith("on")]
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        with pytest.raises(urllib.error.HTTPError, match="405"):
            read(compressing_server, method)


def test_it_shows_nothing_a_client_wrote(compressing_server):
    """Neither the prompt's words nor the name that the client gave its request."""
    prompt, name = make_example("niah", NUM_TOKENS, 3).prompt, "name-a-client-gives"
    reply = compress(compressing_server, prompt, extra_headers={"X-Request-Id": name})
    page = read(compressing_server)[1]
    assert name in reply.id, "the engine knows the request by it"
    assert name not in page and " ".join(prompt.split()[:3]) not in page


def test_it_is_off_unless_named(plain_server):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(plain_server)
