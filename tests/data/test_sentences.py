"""Sentences of docstrings."""

import pytest

from sparsejax.data.sentences import sentences


@pytest.mark.slow
def test_sentences_of_the_standard_library():
    train, test = sentences("train", 300, 0), sentences("test", 200, 0)
    assert len(set(train)) == 300 and len(set(test)) == 200
    assert all(5 <= len(text.split()) <= 40 for text in train + test)
    assert not set(train) & set(sentences("test", 200, 1))
    assert sum(text[-1] == "." for text in train) > 200
    assert sentences("train", 300, 0) == train != sentences("train", 300, 1)
    assert sentences("train", 100, 0) == train[:100]


def test_what_counts_as_a_sentence(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.py").write_text(
            f'"""Too short."""\nclass A:\n    """The class number {i} of a\n    test. It has a second sentence."""\n'
            "    async def f(self):\n        '''A method without a period at its end\n\n        More of it.'''\n"
        )
    texts = sentences("train", 19, 0, tmp_path)
    assert set(texts) == {f"The class number {i} of a test." for i in range(20) if i % 10} | {
        "A method without a period at its end"
    }
    # what "train" has too is not in "test"
    assert set(sentences("test", 2, 0, tmp_path)) == {f"The class number {i} of a test." for i in (0, 10)}
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"the test split has 2 sentences.*got {count}"):
            sentences("test", count, 0, tmp_path)


def test_mistakes(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.py").write_text("def f(:" if i == 4 else "")
    with pytest.raises(ValueError, match=r"4\.py is not Python: invalid syntax"):
        sentences("train", 1, 0, tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="0 Python files"):
        sentences("train", 1, 0, tmp_path)
    with pytest.raises(ValueError, match="split 'validation'"):
        sentences("validation", 1, 0)
