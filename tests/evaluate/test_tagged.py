"""Files of tagged words."""

from __future__ import annotations

import pytest

from llm2vec_fast.evaluate import Sentence, read_tagged, split

CONLL_2000 = "He PRP B-NP\nran VBD B-VP\n\n# # B-NP\n5 CD I-NP\n. . O\n\n\n"
CONLL_2003 = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"
UNER = (
    "# newdoc id = d1\n# sent_id = 1\n# text = Ann saw 10 000 boats\n"
    "1\tAnn\tB-PER\t-\tx\n2\tsaw\tO\t-\t-\n3\t10 000\tO\t-\t-\n\n"
    "# sent_id = 2\n1\tTampa\tB-LOC\t-\tx\n2\tBay\tI-LOC\t-\tx\n"
)
CONLL_U = (
    "# text = vámonos ya\n1-2\tvámonos" + "\t_" * 8 + "\n"
    "1\tvamos\tir\tVERB" + "\t_" * 6 + "\n2\tnos\tnos\tPRON" + "\t_" * 6 + "\n"
    "2.1\tya\tya\tX" + "\t_" * 6 + "\n3\tya\tya\tADV" + "\t_" * 6 + "\n"
)


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        (tmp_path / "words.txt").write_text(text, encoding="utf-8")
        return tmp_path / "words.txt"

    return write


def test_conll_2000(file):
    path = file(CONLL_2000)
    assert read_tagged(path, "chunk") == [
        Sentence(("He", "ran"), ("B-NP", "B-VP")),
        Sentence(("#", "5", "."), ("B-NP", "I-NP", "O")),  # a word, no comment
    ]
    assert [s.tags for s in read_tagged(path, "pos")] == [("PRP", "VBD"), ("#", "CD", ".")]
    assert len(read_tagged(path, "pos", limit=1)) == 1


def test_conll_2003_has_the_names_last_and_marks_of_documents(file):
    assert read_tagged(file(CONLL_2003), "ner") == [Sentence(("EU", "rejects"), ("B-ORG", "O"))]


def test_universal_ner(file):
    assert read_tagged(file(UNER), "ner") == [
        Sentence(("Ann", "saw", "10 000"), ("B-PER", "O", "O")),
        Sentence(("Tampa", "Bay"), ("B-LOC", "I-LOC")),
    ]
    with pytest.raises(ValueError, match=r"no known column for pos, only for ner.*--tag-column"):
        read_tagged(file(UNER), "pos")


def test_conll_u_counts_syntactic_words_alone(file):
    assert read_tagged(file(CONLL_U), "pos") == [
        Sentence(("vamos", "nos", "ya"), ("VERB", "PRON", "ADV"))
    ]
    assert read_tagged(file(CONLL_U), "pos", tag_column=3)[0].tags == ("ir", "nos", "ya")


@pytest.mark.parametrize(
    ("text", "task", "column", "says"),
    [
        ("a X\nb\n", "pos", None, "line 2 has 1 columns; the pos tag is looked for in column 2"),
        ("a X\n", "chunk", None, "line 1 has 2 columns; the chunk tag is looked for in column 3"),
        ("a\n", "ner", None, "line 1 has 1 columns"),
        ("a X O\nb Y VERB\n", "chunk", None, "line 2: 'VERB' is no chunk tag"),
        ("a X O\n", "ner", 2, "'X' is no ner tag"),
        ("a X\n", "pos", 0, "has 2 columns"),
        ("\n\n", "pos", None, "holds no sentences"),
        ("-DOCSTART- -X- -X- O\n\n", "ner", None, "holds no sentences"),
        ("a X\n", "parse", None, "task must be one of pos, chunk, ner"),
    ],
)
def test_what_is_wrong_is_named(file, text, task, column, says):
    with pytest.raises(ValueError, match=says):
        read_tagged(file(text), task, column)


def test_other_bytes_and_limits(tmp_path, file):
    (tmp_path / "latin").write_bytes(b"caf\xe9 NN\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_tagged(tmp_path / "latin", "pos")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        read_tagged(file(CONLL_2000), "pos", limit=0)


def test_a_split_is_whole_disjoint_and_the_same_again():
    sentences = [Sentence((str(i),), ("X",)) for i in range(50)]
    train, test = split(sentences, 0.2, seed=1)
    assert (len(train), len(test)) == (40, 10)
    assert sorted([*train, *test], key=lambda s: int(s.words[0])) == sentences
    assert (train, test) == split(sentences, 0.2, seed=1)
    assert test != split(sentences, 0.2, seed=2)[1]
    assert test != sentences[-10:]
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(ValueError, match="leaves nothing to test on or to train on"):
            split(sentences, share, seed=1)


def test_the_real_files(shared_data):
    test = shared_data("conll2000/test.txt")
    chunks, parts = read_tagged(test, "chunk"), read_tagged(test, "pos")
    assert (len(chunks), sum(len(s.words) for s in chunks)) == (2012, 47377)
    assert chunks[0].words[:2] == ("Rockwell", "International") and parts[0].tags[0] == "NNP"
    names = read_tagged(shared_data("uner-ewt/en_ewt-ud-dev.iob2"), "ner")
    assert len(names) == 2001
    assert {tag for s in names for tag in s.tags} >= {"O", "B-LOC", "I-PER", "B-ORG"}
