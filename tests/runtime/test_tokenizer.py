"""Tokenizers: text streams without broken characters, chat templates in a sandbox, clear refusals."""

import json
import shutil
from pathlib import Path

import pytest

from nemoc.ir import NemocError
from nemoc.runtime import Executable, Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ extra | default('') }}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<b>é"}]


@pytest.fixture
def folder(exe: Executable, tmp_path: Path) -> Path:
    """The tokenizer files of the model, to be added to."""
    assert exe.folder is not None
    return Path(shutil.copytree(exe.folder / "tokenizer", tmp_path / "tokenizer"))


def test_texts_round_trip(exe: Executable) -> None:
    tokenizer = exe.tokenizer
    ids = tokenizer.encode("HELLO é €")
    assert tokenizer.decode(ids) == "HELLO é €"
    assert tokenizer.decode([1, *ids, 2]) == "HELLO é €"
    assert tokenizer.decode([1, *ids, 2], skip_special=False) == "<s>HELLO é €</s>"
    assert tokenizer.size == 97


def test_tokens_end_where_their_text_does(exe: Executable) -> None:
    tokenizer = exe.tokenizer
    text = "HELLO é € AB"
    ids, ends = tokenizer.encode_with_ends(text)
    assert ids == tokenizer.encode(text)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    for count, end in enumerate(ends, 1):
        found = tokenizer.decode(ids[:count])
        assert text[:end].startswith(found.rstrip("\ufffd"))


def test_a_stream_never_splits_a_character(exe: Executable) -> None:
    tokenizer = exe.tokenizer
    stream = tokenizer.detokenizer()
    text = "A€é €B"
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert "\ufffd" not in "".join(parts)
    assert parts[:4] == ["A", "", "", "€"]


def test_a_stream_gives_up_on_bytes_that_are_no_character(exe: Executable) -> None:
    tokenizer = exe.tokenizer
    euro, letter = tokenizer.encode("€"), tokenizer.encode("A")[0]
    stream = tokenizer.detokenizer()
    assert [stream.push(i) for i in (euro[0], letter)] == ["", "\ufffdA"]
    assert [stream.push(i) for i in euro[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_stream_leaves_special_tokens_out_unless_asked(exe: Executable) -> None:
    ids = [1, *exe.tokenizer.encode("A"), 2]
    plain, full = exe.tokenizer.detokenizer(), exe.tokenizer.detokenizer(skip_special=False)
    assert [plain.push(i) for i in ids] == ["", "A", ""]
    assert [full.push(i) for i in ids] == ["<s>", "A", "</s>"]


@pytest.mark.parametrize("where", ["file", "text", "named"])
def test_chat_uses_the_template_of_the_checkpoint(folder: Path, where: str) -> None:
    config: dict[str, object] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    elif where == "text":
        config["chat_template"] = TEMPLATE
    else:
        named = {"default": TEMPLATE, "tool_use": "no"}
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.open(folder)
    expected = "<s><user>hi</s>\n<assistant><b>é</s>\n<assistant>"
    assert tokenizer.chat(MESSAGES) == expected
    assert tokenizer.chat(MESSAGES, extra="!") == expected + "!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "the chat template refuses the messages: Expected"),
        ("{{ messages.append(1) }}", "is not safely callable|access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses the messages: can only"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(
    folder: Path, template: str, message: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(NemocError, match=message):
        Tokenizer.open(folder).chat(MESSAGES)


def test_json_in_templates_is_plain(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[1] | tojson }}")
    text = Tokenizer.open(folder).chat(MESSAGES)
    assert text == '{"role": "assistant", "content": "<b>é"}'


def test_what_is_missing_or_broken_is_named(exe: Executable, folder: Path) -> None:
    with pytest.raises(NemocError, match="the model has no chat template"):
        exe.tokenizer.chat(MESSAGES)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(NemocError, match=r"tokenizer_config.json: found a JSON list, expected"):
        Tokenizer.open(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(NemocError, match=r"tokenizer_config.json: is not JSON: "):
        Tokenizer.open(folder)
    (folder / "tokenizer_config.json").write_text("[" * 100000)
    with pytest.raises(NemocError, match=r"tokenizer_config.json: is not JSON: "):
        Tokenizer.open(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(NemocError, match=r"chat_template.jinja: is no text"):
        Tokenizer.open(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(NemocError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        Tokenizer.open(folder)


def change_tokenizer(folder: Path, **sections: object) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **sections}))
    return Tokenizer.open(folder)


def test_prompts_are_neither_cut_nor_filled_up(folder: Path) -> None:
    expected = Tokenizer.open(folder).encode("HELLO THERE")
    truncation = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    assert change_tokenizer(folder, truncation=truncation).encode("HELLO THERE") == expected
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    assert change_tokenizer(folder, padding=padding).encode("HELLO THERE") == expected


def test_panics_of_the_tokenizer_are_one_line(folder: Path) -> None:
    hopeless = {
        "type": "Split",
        "pattern": {"Regex": "(h*)*$^|(a*)*b"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = change_tokenizer(folder, pre_tokenizer=hopeless)
    with pytest.raises(NemocError, match=r"tokenizer.json: the text cannot be encoded: ") as caught:
        tokenizer.encode("h" * 40)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_or_token_is_refused(exe: Executable) -> None:
    with pytest.raises(NemocError, match=r"tokenizer.json: the text cannot be encoded: "):
        exe.tokenizer.encode(5)  # type: ignore[arg-type]
    with pytest.raises(NemocError, match=r"tokenizer.json: the tokens cannot be decoded: "):
        exe.tokenizer.decode([-1])
