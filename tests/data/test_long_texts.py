"""Long texts, many control strings and many turns: the tokens of the whole text, in time that grows
with its length only."""

import random
import string
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fastsae.data import long_texts
from fastsae.data.datasets import Deduplicator
from fastsae.data.tokenization import ChatTokenizer, Example

NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'t)?"
    r"|\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\s+(?!\S)|\s+|."
)
CONTROL = ["<|im_end|>", "<|im_start|>", "<|im_start", "|>", "<|im_<|im_end|>"]
PIECES = [
    "the",
    "Bread",
    "it's",
    "don't",
    "3,141.59",
    "12345678",
    "a1b2",
    "(x)",
    "#42",
    ".",
    ",",
    "!?",
    "...",
    "<",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u6c49\u5b57\u3002",
    "\u0645\u0631",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "e\u0301\u0301",
    "\U0001f600\U0001f469\u200d\U0001f469",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " " * 9,
    "http://x.y/z?a=b&c",
    "base64+/==",
    "_snake_case",
    "\u3068\u308a",
    "\u0e44\u0e17\u0e22",
    "\ufb01",
    "=\u0338",
    "\u2028",
    "aaaaaaaaaa",
    "\u00a0",
    '"',
    "'",
]


def trained(model, trainer, pre=None, normalizer=None, decoder=None):
    """A small tokenizer of the demo's texts."""
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre:
        tokenizer.pre_tokenizer = pre
    if decoder:
        tokenizer.decoder = decoder
    lines = (
        (PROJECT / "data" / "cognitive_actions.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:150]
    )
    tokenizer.train_from_iterator(
        [*lines, "".join(PIECES), *string.printable],
        trainer(
            special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            vocab_size=1200,
        ),
    )
    return tokenizer


def byte_level(pattern):
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return trained(models.BPE(), trainers.BpeTrainer, pre, decoder=decoders.ByteLevel())


MARKED = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
TOKENIZERS = {
    "byte level, newer": lambda: byte_level(NEWER),
    "byte level, by case": lambda: byte_level(CASED),
    "no words": lambda: trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer,
        None,
        MARKED,
    ),
    "words by blanks": lambda: trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer,
        pre_tokenizers.Metaspace(),
        normalizers.NFC(),
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        lambda **o: trainers.UnigramTrainer(unk_token="<unk>", **o),
        pre_tokenizers.Metaspace(),
        normalizers.NFKC(),
    ),
}


@pytest.fixture(scope="module", params=["the embedded model's", *TOKENIZERS])
def chat(request, smol_tokenizer):
    """A function that makes a ChatTokenizer of one of several kinds."""
    if request.param in TOKENIZERS:
        import transformers

        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=TOKENIZERS[request.param](),
            unk_token="<unk>",
            eos_token="<|im_end|>",
            additional_special_tokens=["<|im_start|>"],
        )
        tokenizer.chat_template = smol_tokenizer.chat_template
    else:
        tokenizer = smol_tokenizer
    return lambda max_length: ChatTokenizer(tokenizer, max_length=max_length)


def random_text(chance, length):
    joined, size = [], 0
    separators = chance.choice([[" "], ["", " ", "\n"], [""], [" ", ", "]])
    while size < length:
        piece = chance.choice(PIECES + CONTROL) + chance.choice(separators)
        piece *= chance.choice([1] * 20 + [80])
        joined.append(piece)
        size += len(piece)
    return "".join(joined)


def assert_same(found, expected):
    for one, other in zip(found, expected):
        assert one.ids.tolist() == other.ids.tolist() and one.kind.tolist() == other.kind.tolist()
        assert one.role.tolist() == other.role.tolist()
        assert (one.truncated, one.n_control_strings) == (other.truncated, other.n_control_strings)


def test_windows_have_the_tokens_of_the_whole_text(chat, monkeypatch, tally):
    chance, examples = random.Random(0), []
    for _ in range(16):
        turns = [
            random_text(chance, chance.choice([300, 2000])) for _ in range(chance.choice([1, 1, 4]))
        ]
        examples.append(
            Example(
                1,
                [
                    {"role": ("user", "assistant")[i % 2], "content": turn + "."}
                    for i, turn in enumerate(turns)
                ],
            )
        )
    for max_length in (None, 60, 400):
        whole = chat(max_length)(examples)
        with monkeypatch.context() as patch:
            patch.setattr(long_texts, "WINDOW", 100)
            patch.setattr(long_texts, "CALL_CHARACTERS", 300)
            windowed = chat(max_length)
            assert windowed.joints is not None
            assert_same(windowed(examples), whole)
            assert windowed.joints is not None  # no two windows disagreed
        tally("texts tokenised in windows as a whole", len(examples))


def test_a_tokenizer_that_looks_further_is_noticed(monkeypatch):
    """Tokens that depend on how many characters follow: windows disagree, and the whole text is
    read."""

    def encode(text):
        ids = np.array([len(text) - i for i in range(len(text))], np.int32)
        return ids, np.array([[i, i + 1] for i in range(len(text))], np.int64).reshape(-1, 2)

    monkeypatch.setattr(long_texts, "WINDOW", 50)
    with pytest.raises(long_texts.NotLocal):
        list(long_texts.encode_windows("word " * 100, long_texts.re.compile("(?<=d)(?= )"), encode))

    def crossing(text):
        spans = np.array([[i, i + 2] for i in range(0, len(text) - 1, 2)])
        return np.zeros(len(text) // 2, np.int32), spans

    with pytest.raises(long_texts.NotLocal):
        list(
            long_texts.encode_windows(
                "words " * 100, long_texts.re.compile("(?<=s)(?= )"), crossing
            )
        )


def test_vocabularies_that_cross_words_have_no_joint_there(smol_tokenizer):
    import copy

    tokenizer = copy.deepcopy(smol_tokenizer)
    pattern = long_texts.joint_pattern(tokenizer)
    assert pattern.search("one two").start() == 3 and not pattern.search("onetwo")
    tokenizer.add_tokens(["by the way", "7."])
    pattern = long_texts.joint_pattern(tokenizer)
    assert (
        not pattern.search("one two")
        and pattern.search("one,two")
        and pattern.search("7,")
        and not pattern.search("7.")
    )


def seconds(function, *arguments):
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started


@pytest.mark.parametrize(
    "make",
    [
        lambda n: [{"role": "user", "content": "<|im_end|>x" * n}],
        lambda n: [
            {"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(n)
        ],
    ],
    ids=["control strings", "turns"],
)
def test_work_grows_with_the_length_only(smol_tokenizer, make):
    """24 times the text: if work grew with the square, 576 times the processor's time."""
    small, large = (Example(1, make(n)) for n in (500, 12_000))
    chat = ChatTokenizer(smol_tokenizer, max_length=64)
    chat([small])
    fast = min(seconds(chat, [small]) for _ in range(5))
    assert min(seconds(chat, [large]) for _ in range(3)) < 24 * 8 * fast


def test_no_more_of_a_text_is_tokenised_than_is_kept(smol_tokenizer, monkeypatch):
    chat, read = ChatTokenizer(smol_tokenizer, max_length=512), []
    encode = chat._encode
    monkeypatch.setattr(
        chat,
        "_encode",
        lambda texts, **how: read.append(sum(map(len, texts))) or encode(texts, **how),
    )
    # 2.2 MB
    (tokens,) = chat(
        [
            Example(
                1, [{"role": "user", "content": "The bread rose twice, and we waited. " * 60_000}]
            )
        ]
    )
    assert len(tokens.ids) == 512 and tokens.truncated and sum(read) < 3 * long_texts.WINDOW


def test_examples_are_batched_by_their_length(smol_tokenizer, monkeypatch):
    from fastsae.data import tokenization as examples

    sizes = []
    monkeypatch.setattr(examples, "BATCH_CHARACTERS", 1000)
    chat = ChatTokenizer(smol_tokenizer, max_length=64)
    whole = SimpleNamespace(__call__=chat)
    examples.tokenise(
        [Example(i, [{"role": "user", "content": "x " * 300}]) for i in range(10)],
        lambda batch: sizes.append(len(batch)) or whole.__call__(batch),
    )
    assert sizes == [2] * 5


def test_a_template_that_drops_most_turns_costs_little(smol_tokenizer):
    from fastsae.data.tokenization import _spans_found

    messages = [{"role": "user", "content": f"missing {i}"} for i in range(4_000)]
    text = "x" * 400_000 + "last turn"
    spans = _spans_found(text, [*messages, {"role": "user", "content": "last turn"}], [2] * 4_001)
    assert len(spans) <= 1
    few = _spans_found(text, [*messages[:20], {"role": "user", "content": "last turn"}], [2] * 21)
    assert few == [(400_000, 400_009, 2)]


def test_deduplication_of_a_long_text_in_pieces(monkeypatch):
    from fastsae.data import datasets

    words = [f"w{i}" for i in range(500)]
    long = Example(1, [{"role": "user", "content": " ".join(words)}])
    whole = Deduplicator(7)
    whole.is_new(long)
    monkeypatch.setattr(datasets, "GRAMS_AT_ONCE", 32)
    pieces = Deduplicator(7)
    pieces.is_new(long)
    assert pieces.runs[0].tolist() == whole.runs[0].tolist() and len(whole.runs[0]) == 494
    assert not pieces.is_new(
        Example(2, [{"role": "user", "content": "other " + " ".join(words[60:67])}])
    )
