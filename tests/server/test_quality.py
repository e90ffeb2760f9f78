"""The quality harness against real servers: what is broken shows."""

from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from transformers import AutoTokenizer

from benchmarks.prompts import PromptBuilder
from benchmarks.quality import Contender, ask, measure, require_compressed, score
from benchmarks.questions import CHECKPOINT
from benchmarks.suites.tiny import TinySuite
from fastkv_vllm.methods import registry
from tests.server.conftest import MODEL


@pytest.fixture(scope="module")
def prompts():
    builder = PromptBuilder(AutoTokenizer.from_pretrained(CHECKPOINT), 4096)
    return [p for q in TinySuite((1024,)).questions("niah", "1024", 8) for p in builder.prompts(q, "question")]


def test_a_server_that_does_not_compress_is_noticed(plain_server, prompts):
    """Its answers are right: only the counters tell."""
    contender = Contender("snapkv", {"retention_ratio": 0.1})
    answers = ask(replace(plain_server, model=MODEL), prompts[:2], contender)
    assert [score(p, a) for p, a in zip(prompts, answers, strict=False)] == [1, 1]
    with pytest.raises(RuntimeError, match="2 prompts sent, 2 of them to compress; the server compressed 0"):
        require_compressed(plain_server, contender, [p.num_compressed for p in prompts[:2]])


def test_a_broken_method_shows_as_broken(prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SnapKV with its scores turned round, brought in as another plugin would bring a method."""
    (tmp_path / "broken.py").write_text(
        dedent('''
            """A method that keeps what matters least."""

            from dataclasses import dataclass

            from fastkv_vllm.methods.registry import register as register_method
            from fastkv_vllm.methods.snapkv import SnapKV


            def register():
                pass


            @register_method("broken")
            @dataclass(frozen=True)
            class Broken(SnapKV):
                def score(self, **inputs):
                    return -super().score(**inputs)
        ''')
    )
    info = tmp_path / "broken-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbroken = broken:register\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # this process forgets it afterwards
    __import__("broken")
    scored = measure(Contender("broken", {"retention_ratio": 0.1}), CHECKPOINT, {"question": prompts})
    assert len(scored) == 8
    assert sum(s.score for s in scored) <= 1
