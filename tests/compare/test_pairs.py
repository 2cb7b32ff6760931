"""The pairs that ship with the package."""

from statistics import fmean

from datasets import Dataset
from trl import is_conversational

from trl_refplug.compare.pairs import EVAL_PAIRS, load_pairs


def test_format_and_split() -> None:
    train, heldout = load_pairs()
    assert len(heldout) == EVAL_PAIRS
    assert len(train) + len(heldout) >= 100
    for pair in train + heldout:
        assert [message["role"] for message in pair["prompt"]] == ["user"]
        for answer in (pair["chosen"], pair["rejected"]):
            assert [message["role"] for message in answer] == ["assistant"]
            assert answer[0]["content"].strip() == answer[0]["content"] != ""
    assert is_conversational(Dataset.from_list(train)[0])


def test_every_prompt_and_answer_is_there_once() -> None:
    train, heldout = load_pairs()
    for column in ("prompt", "chosen", "rejected"):
        texts = [pair[column][0]["content"] for pair in train + heldout]
        assert len(set(texts)) == len(texts)


def test_preferred_answers_are_concise_and_the_others_do_not_share_a_phrase() -> None:
    train, heldout = load_pairs()
    chosen = [pair["chosen"][0]["content"].split() for pair in train + heldout]
    rejected = [pair["rejected"][0]["content"].split() for pair in train + heldout]
    assert all(2 * len(concise) < len(rambling) for concise, rambling in zip(chosen, rejected, strict=True))
    assert fmean(map(len, chosen)) * 3 < fmean(map(len, rejected))
    openings = [" ".join(words[:3]).lower() for words in rejected]
    assert max(map(openings.count, openings)) <= 2
