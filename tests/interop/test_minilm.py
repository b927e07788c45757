"""The sentence encoder all-MiniLM-L6-v2, if the package that ships it is installed."""

import json

import numpy as np
import pytest
from golden_folders import GOLDEN, expected

from experiments.similarity import encoder_folder
from sparsejax.interop.huggingface import load, tokenizer
from sparsejax.models import sentence_embeddings

SENTENCES = json.loads((GOLDEN / "sentences" / "sentences.json").read_text())
PUBLISHED = (  # what the model's users print for the first two sentences of its card
    (0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374481, 0.0026527),
    (0.0864386, 0.1027627, 0.0053946),
)


@pytest.fixture(scope="module")
def folder():
    try:
        return encoder_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_encoder_gives_the_published_embeddings(folder):
    wanted = expected("sentences")
    text = tokenizer(folder)
    text.enable_padding(pad_id=0)
    batch = text.encode_batch(SENTENCES)
    tokens = np.asarray([each.ids for each in batch], np.int32)
    mask = np.asarray([each.attention_mask for each in batch], np.int32)
    np.testing.assert_array_equal(tokens, wanted["tokens"])
    np.testing.assert_array_equal(mask, wanted["mask"])
    model, params, _ = load(folder)
    found = np.asarray(sentence_embeddings(model, params, tokens, mask))
    np.testing.assert_allclose(found, wanted["embeddings"], atol=2e-6)
    for row, values in zip(found, PUBLISHED, strict=False):
        np.testing.assert_allclose(row[: len(values)], values, atol=1e-6)
    assert found[2] @ found[3] > 0.5 > 0.1 > found[2] @ found[4]
