"""RULER and the needle grid: prompts are as full as they may be, and their text says what their answers claim."""

import json
import random
import re
import uuid
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from benchmarks.suites.base import Question, SuiteDataError
from benchmarks.suites.needle import NeedleGrid
from benchmarks.suites.ruler import Ruler, string_match_all, string_match_part
from benchmarks.suites.ruler_tasks import NOISE, NUM_WORDS, distinct_words, largest_fill
from benchmarks.tiny_model.language import build_tokenizer

LENGTHS = (2048, 4096)  # cwe repeats its words less below 4096
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
FILES = {"essays.txt": {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}}
FILES |= {"squad.json": {"qa_1"}, "hotpotqa.json": {"qa_2"}}
WITHOUT_DATA = set(Ruler.tasks) - set.union(*FILES.values())
# task: (needles in the text, None for a text made of them; keys asked for; values; what a value is)
NEEDLE_TASKS = {
    "niah_single_1": (1, 1, 1, "number"),
    "niah_single_2": (1, 1, 1, "number"),
    "niah_single_3": (1, 1, 1, "uuid"),
    "niah_multikey_1": (4, 1, 1, "number"),
    "niah_multikey_2": (None, 1, 1, "number"),
    "niah_multikey_3": (None, 1, 1, "uuid"),
    "niah_multivalue": (4, 1, 4, "number"),
    "niah_multiquery": (4, 4, 4, "number"),
}
NEEDLE = re.compile(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.")
MARKED = re.compile(r"\d+\. (\w+)")


def essay_text(num_sentences: int) -> str:
    rng = random.Random(1)
    words = ["the", "idea", "of", "startups", "is", "writing", "well", "extraordinarily", "often", "you", "see"]
    return "  \n".join(
        " ".join(rng.choices(words, k=rng.randrange(3, 20))).capitalize() + rng.choice(".!?")
        for _ in range(num_sentences)
    )


def squad(num_articles: int) -> dict:
    """Articles of eight paragraphs; every paragraph has one question with an answer and one without."""

    def paragraph(article: int, place: int) -> dict:
        answers = [{"text": f"The Treaty {article}-{place}"}, {"text": f"A treaty, {article}-{place}"}]
        asked = {"question": f"What ended war {article}-{place}?", "answers": answers, "is_impossible": False}
        hopeless = {"question": f"What began war {article}-{place}?", "answers": [], "is_impossible": True}
        context = (
            f"Article {article}. The Treaty {article}-{place} ended war {article}-{place}. " + "It was long. " * place
        )
        return {"context": context, "qas": [hopeless, asked]}

    return {"data": [{"paragraphs": [paragraph(i, j) for j in range(8)]} for i in range(num_articles)]}


def hotpotqa(num_questions: int, *, long: int = -1) -> list[dict]:
    """Questions with three paragraphs each, the last of which two neighbours share; those of `long` have 6000 words."""

    def entry(i: int) -> dict:
        filler = " They met often." * (2000 if i == long else 20)
        paragraphs = [[f"Band {i}", [f"Band {i} was led by Singer {i}."]]]
        paragraphs += [
            [f"Singer {i}", [f"Singer {i} was born in Town {i}.", filler]],
            [f"Label {i // 2}", ["A label."]],
        ]
        return {"question": f"Where was the leader of Band {i} born?", "answer": f"Town {i}", "context": paragraphs}

    return [entry(i) for i in range(num_questions)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    (directory / "essays.txt").write_text(essay_text(1000))
    (directory / "squad.json").write_text(json.dumps(squad(40)))
    (directory / "hotpotqa.json").write_text(json.dumps(hotpotqa(120)))
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that encodes any text and puts a mark in front."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    words = distinct_words(random.Random(0))
    lines = [f"{essay_text(20)} {NOISE} {i}. {next(words)}" for i in range(200)]
    trainer = BpeTrainer(vocab_size=900, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<s>"])
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module", params=[byte_tokenizer, build_tokenizer], ids=["bytes", "words"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return request.param()


@pytest.fixture(scope="module")
def ruler(tokenizer, data) -> Ruler:
    return Ruler(tokenizer, LENGTHS, data)


def tokens(tokenizer, text: str) -> int:
    """Tokens of a piece of text, without the mark in front."""
    return len(tokenizer.encode(text, add_special_tokens=False))


def prompt_tokens(tokenizer, question: Question) -> int:
    (turn,) = question.turns
    return len(tokenizer.encode(question.context + turn.question + turn.answer_prefix))


@cache
def ask(ruler: Ruler, task: str, length: int, count: int = 2) -> tuple[Question, ...]:
    found = tuple(ruler.questions(task, str(length), count))
    assert len(found) == count
    return found


def largest_unit(tokenizer, question: Question) -> int:
    """Tokens of the largest piece by which the question's context could have grown."""
    task = question.task
    if task in ("niah_single_1", "vt"):
        return tokens(tokenizer, f"\n{NOISE}")
    if task in ("niah_multikey_2", "niah_multikey_3"):
        return max(tokens(tokenizer, f"\n{needle[0]}") for needle in NEEDLE.finditer(question.context))
    if task == "cwe":
        repeats = 3 if question.group == "4096" else 1
        return repeats * max(tokens(tokenizer, f" {entry[0]}") for entry in MARKED.finditer(question.context))
    if task == "fwe":
        return 5 * max(tokens(tokenizer, f" {word}") for word in question.context.split()[20:])
    if task.startswith("qa"):
        return 3 + max(tokens(tokenizer, document) for document in question.context.split("\n\n")[2:])
    return max(tokens(tokenizer, f" {word}") for word in question.context.split())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", Ruler.tasks)
def test_prompt_is_full(ruler, task, length) -> None:
    for question in ask(ruler, task, length):
        assert (question.task, question.group, ruler.groups(task)) == (task, str(length), ("2048", "4096"))
        assert question.max_new_tokens == MAX_NEW_TOKENS[task.split("_")[0]]
        room = length - question.max_new_tokens - prompt_tokens(ruler.tokenizer, question)
        assert 0 <= room < largest_unit(ruler.tokenizer, question)


@pytest.mark.parametrize("task", Ruler.tasks)
def test_questions_depend_on_seed_task_length_and_index_alone(ruler, data, task) -> None:
    first, second = ask(ruler, task, 2048)
    again = Ruler(ruler.tokenizer, (2048,), data)
    assert ask(again, task, 2048, 1) == (first,)
    assert first.context != second.context
    assert first.turns != second.turns
    other = Ruler(ruler.tokenizer, LENGTHS, data, seed=1)
    assert ask(other, task, 2048, 1)[0].context != first.context


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needles_hold_the_answers(ruler, task, length) -> None:
    num_needles, num_asked, num_answers, kind = NEEDLE_TASKS[task]
    for question in ask(ruler, task, length):
        (turn,) = question.turns
        needles = NEEDLE.findall(question.context)
        asked = re.search(r" for (.+) mentioned in the provided text\?$", turn.question)[1]
        keys = re.split(r", and |, ", asked)
        assert len(needles) == num_needles if num_needles else len(needles) > 10
        assert {name for name, _, _ in needles} == {kind}
        assert (len(set(keys)), len(set(turn.answers))) == (num_asked, num_answers)
        held = [value for key in keys for _, found, value in needles if found == key]
        assert sorted(held) == sorted(turn.answers)
        assert all(question.context.count(answer) == 1 for answer in turn.answers)
        for answer in turn.answers:
            assert re.fullmatch(r"[1-9]\d{6}", answer) if kind == "number" else uuid.UUID(answer).version == 4
        noun = kind if num_answers == 1 else f"{kind}s"
        start, end = ("A", "is") if num_answers == 1 else ("Some", "are")
        assert question.context.startswith(f"{start} special magic {noun} {end} hidden within the following text.")
        assert f"quiz you about the {noun} afterwards.\n" in question.context
        assert turn.question.startswith(
            f"\nWhat {end if num_answers == 1 else 'are all'} the special magic {noun} for "
        )
        assert turn.answer_prefix == f" The special magic {noun} for {asked} mentioned in the provided text {end}"


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multivalue", "niah_multiquery"])
def test_first_answer_is_at_any_place_among_needles(ruler, task) -> None:
    places = set()
    for question in ask(ruler, task, 2048, 20):
        values = [value for _, _, value in NEEDLE.findall(question.context)]
        places.add(values.index(question.turns[0].answers[0]))
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize("task", sorted(FILES["essays.txt"]))
def test_essay_is_whole_around_needles(ruler, task) -> None:
    essay = essay_text(1000).split()
    for question in ask(ruler, task, 4096):
        text = question.context.split("\n", 1)[1]
        words = NEEDLE.sub("", text).split()
        assert words == essay[: len(words)]
        starts = [needle.start() for needle in NEEDLE.finditer(text) if needle.end() < len(text)]
        assert all(start == 0 or text[start - 2] in ".!?" for start in starts)
        pieces = re.split(r"(?<=[.!?]) | (?=<needle>)", NEEDLE.sub("<needle>.", text))
        places = [place for place, piece in enumerate(pieces) if piece == "<needle>."]
        num_sentences = len(pieces) - len(places)
        depths = {num_sentences * round(100 * i / 39) // 100 for i in range(40)}
        assert {place - i for i, place in enumerate(places)} <= depths
        assert len(places) == NEEDLE_TASKS[task][0]


def test_short_essays_are_repeated(ruler, tmp_path) -> None:
    (tmp_path / "essays.json").write_text(json.dumps({"text": "One  two. Three\nfour five?"}))
    (question,) = ask(Ruler(ruler.tokenizer, LENGTHS, tmp_path), "niah_single_2", 2048, 1)
    words = NEEDLE.sub("", question.context.split("\n", 1)[1]).split()
    assert len(words) > 100
    assert words == (["One", "two.", "Three", "four", "five?"] * len(words))[: len(words)]


def variables(text: str) -> dict[str, str]:
    """Values of all variables after the assignments, in order; one that reads an unknown variable is an error."""
    values = {}
    for name, source in re.findall(r"^VAR (\w+) = (.+?) ?$", text, re.MULTILINE):
        assert name not in values
        values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    return values


@pytest.mark.parametrize("length", LENGTHS)
def test_variable_chains_resolve_to_the_answers(ruler, length) -> None:
    for question in ask(ruler, "vt", length):
        (turn,) = question.turns
        _, example, text = question.context.split("Memorize and track the chain(s) of variable assignment hidden in")
        value = re.search(r" assigned the value (\d{5}) in the text above\.$", turn.question)[1]
        assert f" 5 variables are assgined the value {value}, they are: " in turn.answer_prefix
        assert variables(text) == dict.fromkeys(turn.answers, value)
        assert len(turn.answers) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in turn.answers)
        assert set(text.split("\n\n", 1)[1].splitlines()) - {NOISE} == set(re.findall("^VAR.*$", text, re.MULTILINE))
        asked, solution = re.search(r"assigned the value (\d+) in .* they are:  (.*)\n\n$", example).groups()
        assert variables(example) == dict.fromkeys(solution.split(), asked)
        assert all(re.fullmatch("[A-Z]{3}", name) for name in solution.split())
        prompt = question.context.split(f" {solution}\n\n")[0]
        room = 500 - len(ruler.tokenizer.encode(prompt))
        assert 0 <= room < tokens(ruler.tokenizer, f"\n{NOISE}") or (room < 0 and prompt.count(NOISE) == 5)


def listed(text: str) -> Counter[str]:
    """Words of a numbered list, whose numbers must go up by one."""
    numbers = [int(number) for number in re.findall(r"(\d+)\. ", text)]
    assert numbers == list(range(1, len(numbers) + 1))
    return Counter(MARKED.findall(text))


@pytest.mark.parametrize(
    ("length", "example_counts", "counts"), [(2048, (3, 1, 20), (6, 1)), (4096, (10, 3, 40), (30, 3))]
)
def test_common_words_are_the_answers(ruler, length, example_counts, counts) -> None:
    for question in ask(ruler, "cwe", length):
        (turn,) = question.turns
        _, example, text = question.context.split("Memorize the ones that appear most often.\n")
        words = listed(text)
        assert {word for word, _ in words.most_common(10)} == set(turn.answers)
        assert len(set(turn.answers)) == 10
        assert (set(words.values()), len(words) > 10) == (set(counts), True)
        assert sum(count == counts[0] for count in words.values()) == 10
        in_order = MARKED.findall(text)
        assert set(turn.answers) & set(in_order[-len(in_order) // 3 :])
        solved, solution = re.match(r"(.*)\nQuestion: .* in the list are: (.*)\n", example).groups()
        words = listed(solved)
        assert {word for word, _ in words.most_common(10)} == set(listed(solution))
        assert (*sorted(set(words.values()), reverse=True), len(words)) == example_counts


@pytest.mark.parametrize("length", LENGTHS)
def test_frequent_words_are_the_answers(ruler, length) -> None:
    for question in ask(ruler, "fwe", length):
        (turn,) = question.turns
        text = question.context.split("coded words. ")[1].split()
        assert {"...", *turn.answers} <= set(text[: len(text) // 2]) & set(text[len(text) // 2 :])
        words = Counter(text)
        (dots, most), *coded = words.most_common()
        assert dots == "..."
        assert tuple(word for word, _ in coded[:3]) == turn.answers
        assert all(left > right for (_, left), (_, right) in pairwise(coded[:4]))
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in coded)
        assert len(words) <= length // 50
        for rank, (_, count) in enumerate(coded[:3], 2):
            assert count == pytest.approx(most / rank**2, abs=1)


def shown_documents(question: Question) -> list[str]:
    blocks = question.context.split("\n\n")[2:]
    assert [block.split("\n")[0] for block in blocks] == [f"Document {i}:" for i in range(1, len(blocks) + 1)]
    documents = [block.split("\n", 1)[1] for block in blocks]
    assert len(set(documents)) == len(documents)
    return documents


def test_squad_answers_stand_in_one_document(ruler) -> None:
    places = set()
    for i, question in enumerate(ask(ruler, "qa_1", 2048, 10)):
        (turn,) = question.turns
        article, place = divmod(i, 8)
        assert turn.question.endswith(f"\n\nQuestion: What ended war {article}-{place}?")
        assert turn.answers == (f"The Treaty {article}-{place}", f"A treaty, {article}-{place}")
        documents = shown_documents(question)
        (own,) = [k for k, document in enumerate(documents) if f"{turn.answers[0]} ended" in document]
        places.add(own)
        assert sum(document.startswith(f"Article {article}. ") for document in documents) == 8
        assert len(documents) > 8
    assert len(places) > 5


def test_hotpotqa_shows_all_documents_of_the_question(ruler) -> None:
    for number, question in enumerate(ask(ruler, "qa_2", 2048, 10)):
        (turn,) = question.turns
        answer = f"Town {number}"
        assert (turn.question.split("Question: ")[1], turn.answers) == (
            f"Where was the leader of Band {number} born?",
            (answer,),
        )
        documents = shown_documents(question)
        assert f"Singer {number}\nSinger {number} was born in {answer}.{' They met often.' * 20}" in documents
        assert {document.split("\n")[0] for document in documents} > {f"Band {number}", f"Label {number // 2}"}


def test_question_too_long_for_its_group_is_passed_over(tokenizer, tmp_path) -> None:
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpotqa(5, long=1)))
    questions = Ruler(tokenizer, (2048,), tmp_path).questions("qa_2", "2048", 9)
    assert [question.turns[0].answers for question in questions] == [(f"Town {i}",) for i in (0, 2, 3, 4)]


def test_questions_end_where_the_data_ends(tokenizer, tmp_path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(squad(2)))
    questions = list(Ruler(tokenizer, LENGTHS, tmp_path).questions("qa_1", "4096", 99))
    assert len(questions) == 16
    assert {len(shown_documents(question)) for question in questions} == {16}


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_named(tokenizer, tmp_path, file) -> None:
    for task in FILES[file]:
        with pytest.raises(SuiteDataError, match=f"no data directory is given; it must hold {file}"):
            Ruler(tokenizer, LENGTHS).questions(task, "2048", 1)
        with pytest.raises(SuiteDataError, match=f"{tmp_path} must hold {file}"):
            Ruler(tokenizer, LENGTHS, tmp_path).questions(task, "2048", 1)


def test_essays_without_words_are_refused(tokenizer, tmp_path) -> None:
    (tmp_path / "essays.txt").write_text(" \n")
    with pytest.raises(SuiteDataError, match=r"essays\.txt must hold the essays, but it has no words"):
        Ruler(tokenizer, LENGTHS, tmp_path).questions("niah_single_2", "2048", 1)


@pytest.mark.parametrize("task", sorted(WITHOUT_DATA))
def test_generated_tasks_need_no_data(ruler, task) -> None:
    assert ask(Ruler(ruler.tokenizer, LENGTHS), task, 2048) == ask(ruler, task, 2048)


def test_wrong_arguments_are_refused(ruler) -> None:
    with pytest.raises(ValueError, match=r"task must be one of niah_single_1, .*, qa_2, not 'qa_3'"):
        ruler.groups("qa_3")
    with pytest.raises(ValueError, match="group must be one of 2048, 4096, not '1024'"):
        ruler.questions("vt", "1024", 1)
    with pytest.raises(ValueError, match=r"must have at most 20 tokens, but its smallest has \d{2,}"):
        list(Ruler(ruler.tokenizer, (50,)).questions("vt", "50", 1))


def test_metrics() -> None:
    assert string_match_all("It is 12, 34 and 56.", ("12", "34", "56")) == 1
    assert string_match_all("It is 12 or 65.", ("12", "34", "56")) == pytest.approx(1 / 3)
    assert string_match_all("abcde", ("ABC", "CDE")) == 1
    assert string_match_all("99", ("12", "34")) == 0
    assert string_match_part("In the year of the treaty", ("1648", "The Treaty")) == 1
    assert string_match_part("1649", ("1648", "The Treaty")) == 0


@pytest.mark.parametrize("task", Ruler.tasks)
def test_metric_of_each_task(ruler, task) -> None:
    question, other = ask(ruler, task, 2048)
    answers = question.turns[0].answers
    assert question.metric(" ".join(answers), answers) == 1
    assert question.metric(" ".join(other.turns[0].answers), answers) == 0
    assert question.metric(f"{answers[0]}.", answers) == (1 if task.startswith("qa") else 1 / len(answers))


@pytest.mark.parametrize("limit", [10, 11, 57, 1000, 99_999])
@pytest.mark.parametrize("kind", ["linear", "bent", "noisy", "steps"])
def test_largest_fill(kind, limit) -> None:
    counts = {
        "linear": lambda units: 3 + 7 * units,
        "bent": lambda units: 9 + units**2 // 50,
        "noisy": lambda units: 4 + 3 * units + random.Random(units).randrange(5),
        "steps": lambda units: 10 + 100 * (units // 40),
    }
    asked = []

    def count(units: int) -> int:
        asked.append(units)
        return counts[kind](units)

    units = largest_fill(count, limit, 1)
    assert counts[kind](units) <= limit < counts[kind](units + 1)
    assert len(asked) == len(set(asked)) < 50
    assert largest_fill(count, limit, units, units + 1) == units
    assert largest_fill(count, limit, 1, 1) == 1
    assert largest_fill(count, 9, 1) is None or kind in ("bent", "noisy")


def test_words_are_many_and_none_is_part_of_another() -> None:
    words = distinct_words(random.Random(0))
    some = {next(words) for _ in range(20_000)}
    assert len(some) == 20_000 <= NUM_WORDS
    assert all(re.fullmatch("([^aeiou][aeiou]){3}", word) for word in some)


@pytest.fixture(scope="module", params=[False, True], ids=["own-text", "essays"])
def grid(request, tokenizer, data) -> NeedleGrid:
    return NeedleGrid(tokenizer, (1024, 2048), data if request.param else None)


@pytest.mark.parametrize("length", [1024, 2048])
def test_needle_stands_at_its_depth(grid, length) -> None:
    questions = list(grid.questions("needle", str(length), 13))
    assert [question.meta["depth"] for question in questions] == [*(i / 10 for i in range(11)), 0, 0.1]
    for question in questions:
        (turn,) = question.turns
        city = re.match(r"\n\nWhat is the special number of (\w+)\? ", turn.question)[1]
        needle = f"The special number of {city} is {turn.answers[0]}."
        before, after = question.context.split(needle)
        sentences = re.split(r"(?<=[.!?]) ", before + after.strip())
        total = len(before) + len(after)
        sentence_share = (1 + max(map(len, sentences))) / total
        assert question.meta == {"depth": pytest.approx(len(before) / total, abs=sentence_share), "length": length}
        assert len(before) <= question.meta["depth"] * (total + 1)
        assert before == "" or re.search(r"[.!?] $", before)
        assert (before == "", after == "") == (question.meta["depth"] == 0, question.meta["depth"] == 1)
        assert turn.answer_prefix == f" The special number of {city} is"
        room = length - question.max_new_tokens - prompt_tokens(grid.tokenizer, question)
        assert 0 <= room < max(tokens(grid.tokenizer, f" {sentence}") for sentence in sentences) + 5
        assert question.metric(f"It is {turn.answers[0]}!", turn.answers) == 1
        assert question.metric(city, turn.answers) == 0
    assert len({question.turns[0].answers for question in questions}) == 13
    assert list(grid.questions("needle", str(length), 2)) == questions[:2]


def test_needle_haystack(tokenizer, data, tmp_path) -> None:
    (question,) = NeedleGrid(tokenizer, (1024,), data, depths=(1.0,)).questions("needle", "1024", 1)
    words = question.context.split()[:-7]
    assert words == essay_text(1000).split()[: len(words)]
    assert len(words) > 100
    with pytest.raises(SuiteDataError, match=f"{tmp_path} must hold essays.txt"):
        NeedleGrid(tokenizer, (1024,), tmp_path).questions("needle", "1024", 1)
    with pytest.raises(ValueError, match="task must be needle, not 'vt'"):
        NeedleGrid(tokenizer, (1024,)).groups("vt")
    with pytest.raises(ValueError, match="group must be one of 1024, not '512'"):
        NeedleGrid(tokenizer, (1024,)).questions("needle", "512", 1)
