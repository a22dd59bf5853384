import warnings

import pytest
import torch
from datasets import Dataset

from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import ENCODER_DECODER
from lora_ggpo.models.load import load_model
from lora_ggpo.tasks import NO_LOSS
from tests.tasks.make import task

TEXTS = ["A fine film.", "Dull, and far too long for the little it has to say.", "Fun."]
WORDS = ["negative", "positive"]
REVIEWS = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1], "id": ["a", "b", "c"]})


def causal(**fields):
    return task(kind="causal-classification", **({"label_words": WORDS} | fields))


PAIR = "Premise: {text}\nHypothesis: {text_pair}\nRelation:"
NLI = Dataset.from_dict(
    {"text": TEXTS, "text_pair": ["It is good.", "It is short and says much.", "No."], "label": [1, 0, 1]}
)


def seq2seq(**fields):
    return task(kind="seq2seq-classification", **({"label_words": WORDS} | fields))


def learnt(row):
    return [label for label in row["labels"] if label != NO_LOSS]


def context(row):
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == NO_LOSS]


# --- classification ------------------------------------------------------------------------------------------------


def test_classification(minilm):
    tokenizer = minilm[1]
    encoded = task(max_length=8).encode(REVIEWS, tokenizer)
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "labels", "length", "label", "id"}
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] a fine film. [SEP]"
    assert encoded["labels"][:] == [1, 0, 1]
    assert encoded["length"][:] == [6, 8, 4]
    assert tokenizer.decode(encoded[1]["input_ids"]) == "[CLS] dull, and far too long [SEP]"


def test_classification_batch_is_padded_to_its_longest_row(minilm):
    tokenizer = minilm[1]
    encoded = task().encode(REVIEWS, tokenizer)
    batch = task().collator(tokenizer)(encoded.to_list())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["input_ids"].shape == (3, max(encoded["length"]))
    assert batch["attention_mask"].sum(dim=1).tolist() == encoded["length"][:]
    assert batch["input_ids"][2, 4:].unique().tolist() == [tokenizer.pad_token_id]


def test_rows_keep_their_order_over_chunks(minilm):
    many = Dataset.from_dict({"text": [f"film {i}" for i in range(2500)], "label": [i % 2 for i in range(2500)]})
    encoded = task().encode(many, minilm[1])
    assert encoded["labels"][:] == many["label"][:]
    for i in (0, 999, 1000, 2499):
        assert minilm[1].decode(encoded[i]["input_ids"], skip_special_tokens=True) == f"film {i}"


def test_pairs_are_encoded_with_their_segments_and_the_longer_text_is_cut(minilm):
    tokenizer = minilm[1]
    encoded = task(max_length=12).encode(NLI, tokenizer)
    assert {"input_ids", "attention_mask", "token_type_ids", "labels", "length"} < set(encoded.column_names)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] a fine film. [SEP] it is good. [SEP]"
    assert encoded[0]["token_type_ids"] == [0] * 6 + [1] * 5
    assert tokenizer.decode(encoded[1]["input_ids"]) == "[CLS] dull, and far too [SEP] it is short and [SEP]"
    batch = task().collator(tokenizer)(encoded.to_list())
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["token_type_ids"][0].tolist() == [0] * 6 + [1] * 5 + [0]


# --- causal classification -----------------------------------------------------------------------------------------


def test_only_the_label_word_is_learnt(smollm2):
    tokenizer = smollm2[1]
    for row, text, label in zip(causal().encode(REVIEWS, tokenizer), TEXTS, [1, 0, 1], strict=True):
        assert tokenizer.decode(context(row)) == f"{text}\nSentiment:"
        assert tokenizer.decode(learnt(row)) == f" {WORDS[label]}"
        assert row["input_ids"] == tokenizer(f"{text}\nSentiment: {WORDS[label]}")["input_ids"]
        assert row["label"] == label
        assert row["length"] == len(row["input_ids"]) == len(row["attention_mask"]) == len(row["labels"])


def test_template_may_hold_braces_and_end_in_spaces(smollm2):
    tokenizer = smollm2[1]
    chosen = causal(template='{"review": "{text}"} ->  ')
    row = chosen.encode(REVIEWS, tokenizer)[0]
    assert tokenizer.decode(row["input_ids"]) == '{"review": "A fine film."} -> positive'


def test_chat_template_and_word_behind_a_line_break(smollm2):
    tokenizer = smollm2[1]
    row = causal(chat_template=True).encode(REVIEWS, tokenizer)[0]
    assert tokenizer.decode(context(row)).endswith(
        "<|im_start|>user\nA fine film.\nSentiment:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(learnt(row)) == "positive"


@pytest.mark.parametrize("chat_template", [False, True])
def test_long_text_is_cut_but_never_template_or_word(smollm2, chat_template):
    tokenizer = smollm2[1]
    text = "word " * 300 + "end"
    chosen = causal(chat_template=chat_template, max_length=60, template="Review: {text}\nSentiment:")
    data = Dataset.from_dict({"text": [text, "Short."], "label": [0, 1]})
    long, short = chosen.encode(data, tokenizer)
    prompt = tokenizer.decode(context(long))
    assert 57 <= long["length"] <= 60
    assert "Review: word word" in prompt
    assert "end" not in prompt.split("Sentiment:")[0].replace("<|im_end|>", "")
    tail = "\nSentiment:<|im_end|>\n<|im_start|>assistant\n" if chat_template else "\nSentiment:"
    assert prompt.endswith(tail)
    assert tokenizer.decode(learnt(long)).strip() == "negative"
    assert "Review: Short.\nSentiment:" in tokenizer.decode(context(short))


def test_both_texts_stand_in_their_places(smollm2):
    tokenizer = smollm2[1]
    tricky = Dataset.from_dict({"text": ["say {text_pair}"], "text_pair": ["and {text}"], "label": [0]})
    row = causal(template=PAIR).encode(tricky, tokenizer)[0]
    assert tokenizer.decode(context(row)) == "Premise: say {text_pair}\nHypothesis: and {text}\nRelation:"


def test_the_longer_of_two_texts_is_cut_first(smollm2):
    tokenizer = smollm2[1]
    data = Dataset.from_dict({"text": ["word " * 300], "text_pair": ["A short one."], "label": [1]})
    chosen = causal(template=PAIR, max_length=50)
    row = chosen.encode(data, tokenizer)[0]
    assert 47 <= row["length"] <= 50
    prompt = tokenizer.decode(context(row))
    assert prompt.startswith("Premise: word word word")
    assert prompt.endswith("\nHypothesis: A short one.\nRelation:")
    both = Dataset.from_dict({"text": ["word " * 300], "text_pair": ["long " * 300], "label": [1]})
    prompt = tokenizer.decode(context(chosen.encode(both, tokenizer)[0]))
    assert abs(prompt.count("word") - prompt.count("long")) <= 1
    assert prompt.count("long") > 10


@pytest.mark.parametrize(
    ("data", "template", "sentence"),
    [
        (NLI, "{text}:", "The data has two texts, but task.template has no {text_pair}"),
        (REVIEWS, PAIR, r"task.template has {text_pair}, but the data has one text only; set data\.text_pair\."),
    ],
)
@pytest.mark.parametrize("kind", ["causal-classification", "seq2seq-classification"])
def test_template_and_data_must_have_the_same_texts(kind, data, template, sentence, minilm):
    chosen = task(kind=kind, template=template, label_words=WORDS)
    with pytest.raises(UserError, match=sentence):
        chosen.encode(data, minilm[1])


def test_no_room_for_the_text(smollm2):
    with pytest.raises(UserError, match="max_length = 5 leaves no room for the text: the template and the longest"):
        causal(max_length=5).encode(REVIEWS, smollm2[1])


def test_words_of_several_tokens_and_words_that_cannot_win(smollm2):
    tokenizer = smollm2[1]
    words = ["not good at all", "wonderful"]
    ids = causal(label_words=words).word_ids(tokenizer)
    assert [tokenizer.decode(word) for word in ids] == [" not good at all", " wonderful"]
    with pytest.raises(UserError, match="'good enough' begins with the tokens of 'good'"):
        causal(label_words=["good enough", "good"]).word_ids(tokenizer)


def test_causal_batch_pads_labels_with_no_loss(smollm2):
    tokenizer = smollm2[1]
    encoded = causal().encode(REVIEWS, tokenizer)
    batch = causal().collator(tokenizer)(encoded.to_list())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == NO_LOSS).all()
    assert ((batch["labels"] != NO_LOSS).sum(dim=1) == 1).all()
    assert batch["labels"].dtype == torch.int64


# --- sequence to sequence ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5_tokenizer(tiny_t5):
    return load_model(tiny_t5, ENCODER_DECODER)[1]


def test_the_encoder_reads_the_prompt_and_the_decoder_learns_the_word(t5_tokenizer):
    chosen = seq2seq(template="nli premise: {text} hypothesis: {text_pair} ")
    encoded = chosen.encode(NLI, t5_tokenizer)
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "labels", "length", "label"}
    for given, row in zip(NLI, encoded, strict=True):
        prompt = f"nli premise: {given['text']} hypothesis: {given['text_pair']}"
        assert row["input_ids"] == t5_tokenizer(prompt)["input_ids"]
        assert row["input_ids"][-1] == t5_tokenizer.eos_token_id
        assert row["labels"] == t5_tokenizer(WORDS[given["label"]])["input_ids"]
        assert row["label"] == given["label"]
        assert row["length"] == len(row["input_ids"]) == len(row["attention_mask"])
    batch = chosen.collator(t5_tokenizer)(encoded.to_list())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum(dim=1).tolist() == encoded["length"][:]
    assert (batch["labels"] != NO_LOSS).sum(dim=1).tolist() == [len(row["labels"]) for row in encoded]


TEMPLATE = "nli premise: {text} hypothesis: {text_pair} result:"


def test_a_long_prompt_is_cut_in_its_texts_and_still_ends(t5_tokenizer):
    data = Dataset.from_dict({"text": ["film " * 200], "text_pair": ["fun"], "label": [0]})
    chosen = seq2seq(template=TEMPLATE, max_length=40)
    row = chosen.encode(data, t5_tokenizer)[0]
    assert 37 <= row["length"] <= 40
    text = t5_tokenizer.decode(row["input_ids"])
    assert text.startswith("nli premise: film film")
    assert text.endswith("hypothesis: fun result:</s>")
    assert t5_tokenizer.decode(row["labels"]) == "negative</s>"
    with pytest.raises(UserError, match="max_length = 5 leaves no room for the text: the template takes"):
        seq2seq(template=TEMPLATE, max_length=5).encode(data, t5_tokenizer)


def test_a_word_may_begin_another_since_its_end_is_learnt(t5_tokenizer):
    ids = seq2seq(label_words=["good", "good enough"]).word_ids(t5_tokenizer)
    assert [t5_tokenizer.decode(word) for word in ids] == ["good</s>", "good enough</s>"]
    with pytest.raises(UserError, match="'good  enough' begins with the tokens of 'good enough'"):
        seq2seq(label_words=["good enough", "good  enough"]).word_ids(t5_tokenizer)


# --- prompt and completion, messages -------------------------------------------------------------------------------

PAIRS = Dataset.from_dict({"prompt": ["Q: 2+2?\nA:", "Say hi:"], "completion": [" 4", "hi"]})
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
]


def test_completion_ends_in_the_end_token_and_alone_is_learnt(smollm2):
    tokenizer = smollm2[1]
    first, second = task(kind="sft").encode(PAIRS, tokenizer)
    assert tokenizer.decode(context(first)) == "Q: 2+2?\nA:"
    assert tokenizer.decode(learnt(first)) == " 4<|im_end|>"
    assert learnt(first)[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt(second)) == "hi<|im_end|>"


def test_prompt_tokens_stand_as_they_would_in_generation(smollm2):
    tokenizer = smollm2[1]
    data = Dataset.from_dict({"prompt": ["The answer is un"], "completion": ["known"]})  # together one token: unknown
    row = task(kind="sft").encode(data, tokenizer)[0]
    assert context(row) == tokenizer("The answer is un")["input_ids"]
    assert tokenizer.decode(learnt(row)) == "known<|im_end|>"


def test_template_of_a_prompt_and_spaces_at_its_end(smollm2):
    tokenizer = smollm2[1]
    data = Dataset.from_dict({"prompt": ["2+2? "], "completion": ["4"]})
    row = task(kind="sft", template="Q: {text}\nA: ").encode(data, tokenizer)[0]
    assert tokenizer.decode(context(row)) == "Q: 2+2? \nA:"
    assert tokenizer.decode(learnt(row)) == " 4<|im_end|>"
    plain = task(kind="sft").encode(data, tokenizer)[0]
    assert tokenizer.decode(context(plain)) == "2+2? "  # the user's own space stays where it is
    chat = task(kind="sft", template="Q: {text} ", chat_template=True).encode(data, tokenizer)[0]
    assert "<|im_start|>user\nQ: 2+2? <|im_end|>" in tokenizer.decode(context(chat))
    assert tokenizer.decode(learnt(chat)) == "4<|im_end|>"


def test_messages_have_no_template(smollm2):
    data = Dataset.from_list([{"messages": TALK}])
    with pytest.raises(UserError, match=r"task\.template is for prompts and completions, but the data has messages"):
        task(kind="sft", template="Q: {text}").encode(data, smollm2[1])


def test_chat_template_wraps_prompt_and_completion(smollm2):
    tokenizer = smollm2[1]
    row = task(kind="sft", chat_template=True).encode(PAIRS, tokenizer)[1]
    assert tokenizer.decode(learnt(row)) == "hi<|im_end|>"
    assert tokenizer.decode(context(row)).endswith("user\nSay hi:<|im_end|>\n<|im_start|>assistant\n")


def test_messages_learn_the_assistants_turns_only(smollm2):
    tokenizer = smollm2[1]
    row = task(kind="sft").encode(Dataset.from_list([{"messages": TALK}]), tokenizer)[0]
    assert tokenizer.decode(learnt(row)) == "Hi!<|im_end|>4.<|im_end|>"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == whole.removesuffix("\n")
    assert row["input_ids"] == tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]


LONG = Dataset.from_dict(
    {"prompt": ["word " * 50, "a", "a"], "completion": ["lost", "kept but cut " * 20, "whole"]}  # beside a prompt
)


def whole_lengths(tokenizer):
    """Tokens of prompt and of completion with its end, of each row of LONG."""
    return [
        (len(tokenizer(row["prompt"])["input_ids"]), len(tokenizer(row["completion"])["input_ids"]) + 1) for row in LONG
    ]


def test_what_max_length_takes_is_said_once_with_its_numbers(smollm2):
    tokenizer = smollm2[1]
    lengths = whole_lengths(tokenizer)
    lost = lengths[0][1] + sum(lengths[1]) - 16
    learnt, longest = sum(answer for _, answer in lengths), max(map(sum, lengths))
    with pytest.warns(UserWarning, match="train: ") as caught:
        encoded = task(kind="sft", max_length=16).encode(LONG, tokenizer, "train")
    assert [str(warning.message) for warning in caught] == [
        "train: 1 of 3 rows are cut at task.max_length = 16 tokens, so what they teach has no end; 1 of 3 rows are "
        f"left out: their prompt fills task.max_length = 16 tokens. In all {lost} of {learnt} tokens to learn are "
        f"lost; the longest row has {longest}; raise task.max_length, or set task.too_long: drop."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(kind="sft", max_length=longest).encode(LONG, tokenizer, "train")
    assert encoded["length"][:] == [16, sum(lengths[2])]
    assert tokenizer.eos_token_id not in encoded[0]["labels"]
    assert tokenizer.eos_token_id in encoded[1]["labels"]
    with pytest.raises(UserError, match=r"No row is left: every prompt fills task\.max_length = 16 .* row has 5"):
        task(kind="sft", max_length=16).encode(LONG.select([0]), tokenizer)


def test_rows_that_are_too_long_are_left_out_or_refused_if_the_task_says_so(smollm2):
    tokenizer = smollm2[1]
    longest = max(map(sum, whole_lengths(tokenizer)))
    with pytest.warns(UserWarning, match=r"^2 of 3 rows are left out: they are longer than task\.max_length = 16 tok"):
        kept = task(kind="sft", max_length=16, too_long="drop").encode(LONG, tokenizer)
    assert kept["labels"][:] == task(kind="sft").encode(LONG.select([2]), tokenizer)["labels"][:]
    strict = task(kind="sft", max_length=16, too_long="refuse")
    with pytest.raises(UserError, match=r"^test: 2 of 3 rows are longer than task\.max_length = 16 tokens: "):
        strict.encode(LONG, tokenizer, "test")
    for way in ("cut", "drop", "refuse"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exact = task(kind="sft", max_length=longest, too_long=way)
            assert len(exact.encode(LONG, tokenizer)) == 3


def test_chat_templates_that_cannot_be_used_name_the_row(smollm2):
    tokenizer = smollm2[1]
    chosen = task(kind="sft")
    silent = [{"role": "user", "content": "Hello"}]
    good = Dataset.from_list([{"messages": TALK}, {"messages": silent}])
    with pytest.raises(UserError, match="Row 1: the messages hold no assistant turn"):
        chosen.encode(good, tokenizer)
    with pytest.raises(UserError, match=r"Row 1 \(talks\.jsonl:7\): the messages hold no assistant turn"):
        chosen.encode(good.add_column("id", ["talks.jsonl:3", "talks.jsonl:7"]), tokenizer)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}" + template  # the beginning changes with every turn
        with pytest.raises(UserError, match="Row 0: the tokenizer's chat template changes earlier turns"):
            chosen.encode(good, tokenizer)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UserError, match="chat template rejects a question with its answer: roles must alternate"):
            chosen.encode(good, tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(UserError, match="no chat template"):
            chosen.encode(good, tokenizer)
    finally:
        tokenizer.chat_template = template


# --- bad data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "columns", "fields", "sentence"),
    [
        ("classification", {"text": ["a"], "label": [0]}, {"max_length": 513}, "more than the 512 tokens"),
    ],
)
def test_bad_data(minilm, kind, columns, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        task(kind=kind, **fields).encode(Dataset.from_dict(columns), minilm[1])
