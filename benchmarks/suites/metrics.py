"""Scorers (answer, accepted answers) -> score in [0, 1], written from the definitions of the benchmarks named below.

Sources: github.com/THUDM/LongBench (metrics.py), github.com/OpenBMB/InfiniteBench (src/compute_scores.py),
github.com/microsoft/MInference (scbench/compute_scores.py). Where accepted answers are
alternatives, the best one counts. No figure here needs a package beside Python's own; where that changes it, the
function says so.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import chain

from benchmarks.suites.base import Metric

LETTERS = "ABCD"
_FULL_WIDTH = {chr(ord(mark) + 0xFEE0) for mark in string.punctuation} - {"\uff0e"}
_MARKS = "｡。｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"  # noqa: RUF001
_PUNCTUATION_ZH = {*string.punctuation, *_FULL_WIDTH, *_MARKS}


def _best(score: Callable[[str, str], float], answer: str, accepted: Sequence[str]) -> float:
    return max((score(answer, truth) for truth in accepted), default=0.0)


def _f1(num_common: int, num_answer: int, num_truth: int) -> float:
    """2PR / (P + R) with P = common / answer and R = common / truth."""
    return 2 * num_common / (num_answer + num_truth) if num_common else 0.0


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer, without white space around it, is an accepted one."""
    return float(answer.strip() in accepted)


def substring(answer: str, accepted: Sequence[str]) -> float:
    """1 where an accepted answer is part of the answer."""
    return float(any(truth in answer for truth in accepted))


def substring_any_case(answer: str, accepted: Sequence[str]) -> float:
    """`substring` that takes upper and lower case as equal."""
    return substring(answer.upper(), [truth.upper() for truth in accepted])


def share_of_list(answer: str, accepted: Sequence[str]) -> float:
    """Share of the items of the first accepted answer, "a, b, c", that are part of the answer in any case."""
    items = accepted[0].lower().split(", ")
    return sum(item in answer.lower() for item in items) / len(items)


def word(answer: str, accepted: Sequence[str]) -> float:
    """1 where the first accepted answer is a word of the answer; marks such as ":" and quotes end a word."""
    return float(accepted[0] in re.sub(r"[\n:\"'.,?!{}]", " ", answer).split())


def word_any_case(answer: str, accepted: Sequence[str]) -> float:
    """`word` that takes upper and lower case as equal."""
    return word(answer.upper(), [truth.upper() for truth in accepted])


def first_integer(answer: str, accepted: Sequence[str]) -> float:
    """1 where the first run of digits in the answer is accepted, leading zeros included."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] in accepted)


def first_number(answer: str, accepted: Sequence[str]) -> float:
    """1 where the first number of the answer, its sign aside, equals the accepted one.

    An accepted integer is compared with the integer part.
    """
    found = re.search(r"\d+(\.\d+)?", answer)
    if found is None:
        return 0.0
    value = float(found[0])
    return float((value if "." in accepted[0] else int(value)) == float(accepted[0]))


def last_integer(answer: str, accepted: Sequence[str]) -> float:
    """1 where the last word of the answer is the accepted integer; marks such as "." and quotes end a word."""
    words = re.sub(r"[\n.`'\":]", " ", answer).split()
    return float(
        bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None and int(words[-1]) == int(accepted[0])
    )


def leading_numbers(answer: str, accepted: Sequence[str]) -> float:
    """How many numbers of the first accepted answer, "[1, 4, 8]", come in order from the start, as a share."""
    numbers = [int(number) for number in re.findall(r"\d+", answer)]
    truth = [int(number) for number in re.findall(r"-?\d+", accepted[0])]
    num_right = 0
    for number, right in zip(numbers, truth, strict=False):
        if number != right:
            break
        num_right += 1
    return num_right / len(truth)


def count(answer: str, accepted: Sequence[str]) -> float:
    """Share of the numbers in the answer that equal the accepted one."""
    return _best(_share_of_numbers, answer, accepted)


def retrieval(answer: str, accepted: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the paragraph's ("Paragraph 3", "段落3")."""
    return _best(_share_of_numbers, answer, [re.findall(r"\d+", truth)[0] for truth in accepted])


def _share_of_numbers(answer: str, number: str) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def first_line(metric: Metric) -> Metric:
    """The metric of the answer's first line that is not empty, as LongBench takes it for its few-shot tasks."""
    return lambda answer, accepted: metric(answer.lstrip("\n").split("\n")[0], accepted)


def qa_f1(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the words of both, in lower case, without punctuation and articles."""
    return _best(lambda text, truth: _bag_f1(_words(text), _words(truth)), answer, accepted)


def qa_f1_zh(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the characters of both, in lower case, without punctuation and white space.

    InfiniteBench and SCBench define it so. LongBench cuts words with jieba: its figure for multifieldqa_zh differs.
    """
    return _best(lambda text, truth: _bag_f1(_characters(text), _characters(truth)), answer, accepted)


def _bag_f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    return _f1((Counter(answer) & Counter(truth)).total(), len(answer), len(truth))


def _words(text: str) -> list[str]:
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def _characters(text: str) -> list[str]:
    return [letter for letter in text.lower() if letter not in _PUNCTUATION_ZH and not letter.isspace()]


def classification(answer: str, accepted: Sequence[str], classes: Sequence[str]) -> float:
    """1 / number of classes named in the answer if the right one is among them, else 0.

    A class whose name is part of the right one's is not counted.
    """

    def score(text: str, truth: str) -> float:
        named = [name for name in classes if name in text and (name == truth or name not in truth)]
        return 1 / len(named) if truth in named else 0.0

    return _best(score, answer, accepted)


def code_similarity(answer: str, accepted: Sequence[str]) -> float:
    """Similarity of the answer's first line of code to the accepted line, in hundredths.

    The first line without "`", "#" and "//" counts. The ratio is difflib's, which is what fuzzywuzzy's `ratio`, used
    by LongBench, computes where python-Levenshtein is not installed; with it, figures differ slightly.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search("`|#|//", line)), "")
    return _best(lambda text, truth: round(100 * SequenceMatcher(None, text, truth).ratio()) / 100, code, accepted)


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """ROUGE-L F1 of summaries as the package `rouge` 1.0 defines it, which LongBench uses.

    Sentences end at "."; the distinct words of the longest common subsequences of all pairs of sentences are divided
    by the distinct words of either text.
    """
    return _best(_rouge_l, answer, accepted)


def rouge_l_zh(answer: str, accepted: Sequence[str]) -> float:
    """`rouge_l` with each character a word. LongBench cuts words with jieba: its dureader and vcsum figures differ."""
    return rouge_l(" ".join(answer), [" ".join(truth) for truth in accepted])


def rouge_lsum(answer: str, accepted: Sequence[str]) -> float:
    """rougeLsum F1 as the package `rouge_score` defines it without stemmer, used by InfiniteBench and SCBench.

    Sentences end at a line's end; words are runs of a-z and 0-9 in lower case; of the words of the union of longest
    common subsequences no word counts more often than either text has it.
    """
    return _best(_rouge_lsum, answer, accepted)


def _rouge_l(answer: str, truth: str) -> float:
    # White space between two stops is a sentence of one empty word there.
    ours, theirs = ([part.split() or [""] for part in text.split(".") if part] for text in (answer, truth))
    common = {right[i] for right in theirs for given in ours for i, _ in _common_subsequence(right, given)}
    return _f1(len(common), len(set().union(*ours)), len(set().union(*theirs)))


def _rouge_lsum(answer: str, truth: str) -> float:
    ours, theirs = ([re.findall("[a-z0-9]+", line) for line in text.lower().split("\n")] for text in (answer, truth))
    left_ours, left_theirs = Counter(chain(*ours)), Counter(chain(*theirs))
    num_ours, num_theirs, num_common = left_ours.total(), left_theirs.total(), 0
    for right in theirs:
        for place in sorted({i for given in ours for _, i in _common_subsequence(given, right)}):
            if left_ours[right[place]] and left_theirs[right[place]]:
                num_common += 1
                left_ours[right[place]] -= 1
                left_theirs[right[place]] -= 1
    return _f1(num_common, num_ours, num_theirs)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Places in both of one longest common subsequence, last pair first; a tie is resolved by a step in `second`."""
    lengths = [[0] * (len(second) + 1)]
    for item in first:
        above, row = lengths[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if item == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, places = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            places.append((i, j))
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return places


def stated_letter(answer: str, accepted: Sequence[str]) -> float:
    """1 where the letter after "The correct answer is", in brackets or not, is accepted (LongBench v2)."""
    text = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(found is not None and found[1] in accepted)


def choice(answer: str, accepted: Sequence[str]) -> float:
    """1 where the option the answer names is accepted, by text or letter (InfiniteBench, SCBench).

    The first of these that is there decides: the letter it begins with, all of it, what follows "answer is" or the
    like, the first word that is a letter.
    """
    text = answer.strip()
    if text[:1] and text[0] in LETTERS:
        return float(text[0] in accepted)
    if text in accepted:
        return 1.0
    text = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    stated = _after(text, "answer is:", "answer:", "answer is", "option is")
    if stated is not None:
        return float(stated.startswith(tuple(accepted)))
    letters = [part for part in text.split() if part in LETTERS]
    return float(bool(letters) and letters[0] in accepted)


def buggy_function(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer begins with the letter and "." or ":", or states name or letter (InfiniteBench code_debug)."""
    name, letter = accepted
    text = answer.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(" +", " ", re.sub(r"[\n`'\"*-]|[Oo]ption", " ", text))
    stated = _after(text, "answer is:", "is:", "answer:", "correct option is:")
    return float(stated is not None and stated.startswith((letter, name)))


def _after(text: str, *lead_ins: str) -> str | None:
    """What follows the first lead-in found and the one character after it; None where none is in the text."""
    lead_in = next((lead_in for lead_in in lead_ins if lead_in in text), None)
    return None if lead_in is None else text.split(lead_in, 1)[1][1:]
