"""A word-level tokenizer that loses nothing, and a small Qwen3, both built in code."""

import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prefopt.sandbox import vocabulary as words
from prefopt.sandbox.facts import RELATIONS, sentence
from prefopt.sandbox.tasks import CONSTRAINTS, TEMPLATES

PAD, EOS = "<pad>", "<eos>"
CONTEXT = 128


def _words() -> list[str]:
    """Every word of the world: those after a space, and those that open a document or a line."""
    texts = [*CONSTRAINTS.values(), *(t for templates in TEMPLATES.values() for t in templates)]
    for relation in RELATIONS.values():
        forms = relation.forms.values()
        texts += [*relation.questions, relation.about, *forms, *(sentence(form) for form in forms)]
    texts += [*words.COURTESIES, *(c.lower() for c in words.COURTESIES), *words.INSULTS, *words.EVASIONS, *words.KINDS]
    texts += ["It it is well known that", "The the Tolan word for", "plus Answer", "living working as liking having"]
    texts += words.PEOPLE + words.CITIES + words.RIVERS + words.KINGS + words.ANIMALS + words.JOBS + words.FOODS
    texts += words.PETS + words.CRAFTS + words.DIETS + words.DENS + words.COLOURS + words.YEARS + words.START_WORDS
    texts += words.END_WORDS + words.DICTIONARY + words.FOREIGN + words.NUMBERS
    found = {w for t in texts for w in re.findall(r"[A-Za-z]+|\d+", re.sub(r"\{\w\}", "", t))}
    openers = ["Instruction", "Response", "Note", "Register", "Question", "Known", "Dictionary", "Sums", "Review"]
    return [*openers, *(f" {w}" for w in sorted(found))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, bytes for everything else: `decode(encode(text)) == text` for any text.

    A byte-level BPE whose vocabulary holds the words but which has no merges (`ignore_merges`): a known word is looked
    up whole, an unknown one falls apart into bytes. EOS separates documents and is also the BOS token, as in GPT-2;
    nothing is added when encoding.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for word in _words():
        pieces = byte_level.pre_tokenize_str(word)
        if len(pieces) == 1 and pieces[0][0] not in tokens:
            tokens.append(pieces[0][0])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of about 1.4 M parameters, fp32, random weights drawn from `seed` (the global generator is kept)."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,  # the usual 0.02 learns markedly slower at this width and this few updates
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
