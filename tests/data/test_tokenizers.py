import pytest

from research.core.errors import ConfigError, DataError
from research.data.tokenizers import BytePairs, Bytes, Characters, Tokenizer, fit_tokenizer

TEXT = "Straße “naïve”, 漢字 🙂:\n\n  two  spaces, again again again.\r\n"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_decoding_inverts_encoding_at_once_and_piece_by_piece_also_after_saving(kind, tmp_path):
    tokenizer = fit_tokenizer(kind, TEXT, vocabulary=270)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json") == tokenizer
    ids = Tokenizer.load(tmp_path / "tokenizer.json").encode(TEXT)
    assert ids.dtype == "int32"
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocabulary
    assert tokenizer.decode(ids) == TEXT
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert b"".join(tokenizer.pieces[i] for i in ids) == TEXT.encode()


def test_byte_pairs_are_learnt_and_any_other_text_still_works():
    tokenizer = BytePairs.fit("again " * 50, 262)
    assert len(tokenizer.encode("again")) < 5
    assert tokenizer.decode(tokenizer.encode("漢字")) == "漢字"
    assert tokenizer.encode("").shape == (0,)
    assert 256 < tokenizer.vocabulary <= 262


def test_a_byte_pair_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"data.vocabulary=100"):
        BytePairs.fit("text", 100)


def test_characters_are_numbered_in_sorted_order():
    assert Characters.fit("cabbage").encode("abc").tolist() == [0, 1, 2]


def test_an_unknown_character_is_named_or_replaced():
    with pytest.raises(DataError, match=r"'z' \(U\+007A\) at position 3 .* 3 of the vocabulary"):
        Characters.fit("abc").encode("abcz")
    with pytest.raises(DataError, match=r"U\+1F642"):
        Characters.fit("abc").encode("🙂")
    tokenizer = Characters.fit("abc", unknown="?")
    assert tokenizer.decode(tokenizer.encode("abz🙂")) == "ab??"


def test_cut_off_characters_become_replacement_marks_at_the_end_of_a_stream():
    ids = Bytes().encode("é")[:1]
    assert list(Bytes().stream(ids)) == ["", "\ufffd"]
    assert Bytes().decode(ids) == "\ufffd"


def test_an_unknown_kind_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'bytes'.*did you mean 'byte'"):
        fit_tokenizer("bytes", TEXT, vocabulary=300)
    (tmp_path / "tokenizer.json").write_text('{"kind": "ch')
    with pytest.raises(DataError, match=r"tokenizer.json holds no tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
