"""DistilBertTokenizer: WordPiece by the `tokenizers` library, with transformers' call, ids and files."""

import copy
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Encoding,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fastdistil.batch_encoding import PADDED, BatchEncoding, as_tensor
from fastdistil.checkpoint import find, read_object

logger = logging.getLogger("fastdistil")

SPECIAL = {  # in transformers' order of all_special_tokens
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the second is transformers 4's name
ENDS = ("bos_token", "eos_token")  # which BERT has none of, unless a caller says so
# what transformers' callers pass along, without a meaning here
IGNORED = frozenset(
    (
        *("use_fast", "from_slow", "legacy", "tokenizer_type", "trust_remote_code", "verbose", "_from_auto"),
        *("do_basic_tokenize", "never_split", "add_prefix_space"),
        *("resume_download", "force_download", "proxies", "subfolder", "use_auth_token"),
    )
)
NO_LIMIT = int(1e30)  # transformers' model_max_length where a tokenizer states none
MOST_TOKENS = 2**24  # more to pad to, or in a vocabulary, is a mistake, and takes the memory
MAX_WORD = 100  # WordPiece gives [UNK] for a longer word, so a word has at most this many tokens
PIECE = 2**16  # characters of a text that is read to its end, at a time
CHARS_PER_TOKEN = 8  # a first cut this long nearly always holds enough tokens; English has 4 to 5

Text = str | Sequence[str] | Sequence[Sequence[str]]


class DistilBertTokenizer:
    """BERT's WordPiece tokenizer, cased or uncased, with ids equal to transformers' `DistilBertTokenizer`.

    vocab_file: a vocab.txt, one token a line; or tokenizer: a `tokenizers.Tokenizer`. do_lower_case, strip_accents
    (None: as do_lower_case) and tokenize_chinese_chars are BERT's normaliser; model_max_length is in tokens.
    Padding and truncation happen only when asked for, whatever a tokenizer.json has baked in.
    """

    model_input_names: Sequence[str] = ("input_ids", "attention_mask")
    is_fast = True
    pad_token_type_id = 0

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        do_lower_case: bool = True,
        *,
        tokenizer: Tokenizer | None = None,
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool | None = None,
        model_input_names: Sequence[str] | None = None,
        extra_special_tokens: Any = (),
        additional_special_tokens: Any = (),
        tokenizer_object: Tokenizer | None = None,
        name_or_path: str = "",
        **special_tokens: Any,
    ):
        _check_names(special_tokens)
        special_tokens = {name: token for name, token in special_tokens.items() if name not in IGNORED}
        ends = {name: _content(token) for name in ENDS if (token := special_tokens.pop(name, None)) is not None}
        tokenizer = tokenizer_object if tokenizer is None else tokenizer
        if (vocab_file is None) == (tokenizer is None):
            raise ValueError("give exactly one of vocab_file (a vocab.txt) and tokenizer (a tokenizers.Tokenizer)")
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self._special = ends | SPECIAL | {name: _content(token) for name, token in special_tokens.items()}
        self.name_or_path = name_or_path
        if model_input_names is not None:
            self.model_input_names = list(model_input_names)
        self.extra_special_tokens: list[str] = []
        for name, token in self._special.items():
            if not isinstance(token, str):
                raise TypeError(f"{name} must be a string, got {token!r}")
            if any("\ud800" <= c <= "\udfff" for c in token):
                raise ValueError(f"{name} is {token!r}, which is not text")
        _check_flags(
            {
                "do_lower_case": do_lower_case,
                "tokenize_chinese_chars": tokenize_chinese_chars,
                "strip_accents": strip_accents,
            }
        )
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars, self.strip_accents = tokenize_chinese_chars, strip_accents
        limit = NO_LIMIT if model_max_length is None else model_max_length
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
            raise ValueError(f"model_max_length is {limit!r}; it must be 1 or more")
        self.model_max_length = NO_LIMIT if limit >= NO_LIMIT else int(limit)
        # decode's habit is transformers 4's; that of 5 is not to, unless it was told
        self.says_to_clean_up = bool(clean_up_tokenization_spaces)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces is not False
        self._tokenizer = self._from_vocab(Path(vocab_file)) if vocab_file is not None else _copy(tokenizer)
        self._forget_settings()
        needed = [token for name, token in self._special.items() if name not in ENDS]
        missing = [token for token in needed if self._tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(f"{vocab_file or 'the tokenizer'} lacks the special tokens {', '.join(missing)}")
        self._make_special(list(self._special.values()))
        self._before, self._after = self._template()
        stated = [self.cls_token_id, self.sep_token_id]
        if len(self._before) == len(self._after) == 1 and self._before + self._after != stated:
            self._tokenizer.post_processor = _around(self._tokenizer, self.cls_token, self.sep_token)
            self._before, self._after = self._template()
        if extra := [*_listed(extra_special_tokens), *_listed(additional_special_tokens)]:
            self.add_special_tokens({"extra_special_tokens": extra})

    def _forget_settings(self) -> None:
        """Padding and truncation that a file, or whoever got hold of the library's object, has switched on there."""
        if self._tokenizer.padding is not None:
            self._tokenizer.no_padding()
        if self._tokenizer.truncation is not None:
            self._tokenizer.no_truncation()

    def _make_special(self, tokens: list[str]) -> None:
        """Let them be found in a text as they stand; what a file says of how that is done stays."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._tokenizer.add_special_tokens([token for token in tokens if token not in known])

    def _from_vocab(self, path: Path) -> Tokenizer:
        if not path.is_file():
            raise FileNotFoundError(f"there is no vocabulary {path}")
        try:
            vocab = models.WordPiece.read_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a vocabulary of one token a line: {error}") from error
        special = self._special
        if missing := [token for name, token in special.items() if name not in ENDS and token not in vocab]:
            raise ValueError(f"{path} lacks the special tokens {', '.join(missing)}")
        tokenizer = Tokenizer(
            models.WordPiece(vocab, unk_token=special["unk_token"], max_input_chars_per_word=MAX_WORD)
        )
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.tokenize_chinese_chars,
            strip_accents=self.strip_accents,
            lowercase=self.do_lower_case,
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer = tokenizer
        tokenizer.post_processor = _around(tokenizer, special["cls_token"], special["sep_token"])
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        return tokenizer

    def _add_tokens(self, decoder: Any, where: Path) -> None:
        """The tokens that a tokenizer_config.json adds to a vocab.txt, behind it and in their order."""
        if not isinstance(decoder or {}, dict) or not all(str(number).isdecimal() for number in decoder or {}):
            raise ValueError(f"{where}: added_tokens_decoder must map ids to tokens, got {decoder!r:.80}")
        for number, told in sorted((decoder or {}).items(), key=lambda item: int(item[0])):
            content = told.get("content") if isinstance(told, dict) else told
            if not isinstance(content, str):
                raise ValueError(f"{where}: added_tokens_decoder[{number!r}] is {told!r}, not a token")
            if self._tokenizer.token_to_id(content) is None:
                options = told if isinstance(told, dict) else {}
                kinds = ("lstrip", "rstrip", "normalized", "single_word", "special")
                token = AddedToken(content, **{kind: bool(options[kind]) for kind in kinds if kind in options})
                self._tokenizer.add_tokens([token])
            if self._tokenizer.token_to_id(content) != int(number):
                raise ValueError(
                    f"{where}: the added token {content!r} should have id {number}, but follows the vocabulary as "
                    f"{self._tokenizer.token_to_id(content)}"
                )

    def _add_special(self, settings: dict[str, Any], directory: Path) -> None:
        """The special tokens beside the usual ones, of which a file may tell that does not hold them."""
        for name in EXTRA:
            told = settings.get(name) or []
            for token in told.values() if isinstance(told, dict) else told:
                content = token.get("content") if isinstance(token, dict) else token
                if not isinstance(content, str):
                    raise ValueError(f"{directory}/tokenizer_config.json: {name} holds {token!r}, not a token")
                self._make_special([content])
                if content not in self.extra_special_tokens:
                    self.extra_special_tokens.append(content)

    # --- files --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: Any,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> "DistilBertTokenizer":
        """From a directory or hub id holding tokenizer.json or vocab.txt, with tokenizer_config.json's settings.

        overrides: the constructor's arguments; use_fast and what else has no meaning here is ignored. Raises OSError,
        ValueError or TypeError naming the file.
        """
        _check_names({name: value for name, value in overrides.items() if name not in _ARGUMENTS})
        hub: dict[str, Any] = dict(revision=revision, cache_dir=cache_dir, token=token)
        directory = find(path_or_repo, local_files_only=local_files_only, **hub)
        settings = read_object(directory / "special_tokens_map.json") | read_object(directory / "tokenizer_config.json")
        given: dict[str, Any] = {
            name: value.get("content") if isinstance(value, dict) else value
            for name, value in settings.items()
            if name in (*SPECIAL, *ENDS) and value is not None
        }
        for name in [
            "do_lower_case",
            "tokenize_chinese_chars",
            "strip_accents",
            "model_max_length",
            "padding_side",
            "truncation_side",
            "clean_up_tokenization_spaces",
        ]:
            if settings.get(name) is not None:
                given[name] = settings[name]
        if isinstance(names := settings.get("model_input_names"), list):
            given["model_input_names"] = names
        given |= {"name_or_path": str(path_or_repo)} | overrides
        try:
            _check_flags(given)
        except TypeError as error:
            raise TypeError(f"{directory / 'tokenizer_config.json'}: {error}") from error
        path = directory / "tokenizer.json"
        if not path.is_file():
            if not (directory / "vocab.txt").is_file():
                raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor vocab.txt")
            made = cls(directory / "vocab.txt", **given)
            made._add_tokens(settings.get("added_tokens_decoder"), directory / "tokenizer_config.json")
            added = read_object(directory / "added_tokens.json")
            made._add_tokens({i: token for token, i in added.items()}, directory / "added_tokens.json")
            made._add_special(settings, directory)
            return made
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a readable tokenizer file: {error}") from error
        if not isinstance(tokenizer.model, models.WordPiece):
            raise ValueError(f"{path} is a {type(tokenizer.model).__name__} tokenizer; DistilBERT's is WordPiece")
        _check_vocabulary(tokenizer, path)
        normalizer = tokenizer.normalizer
        if isinstance(normalizer, normalizers.BertNormalizer):
            # the file is right unless tokenizer_config.json (or the caller) says otherwise
            given.setdefault("do_lower_case", normalizer.lowercase)
            given.setdefault("strip_accents", normalizer.strip_accents)
            given.setdefault("tokenize_chinese_chars", normalizer.handle_chinese_chars)
            normalizer.lowercase, normalizer.strip_accents = given["do_lower_case"], given["strip_accents"]
            normalizer.handle_chinese_chars = given["tokenize_chinese_chars"]
            tokenizer.normalizer = normalizer
        try:
            made = cls(tokenizer=tokenizer, **given)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{directory}: {error}") from error
        made._add_tokens(settings.get("added_tokens_decoder"), directory / "tokenizer_config.json")
        made._add_special(settings, directory)
        return made

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The constructor's arguments that make a tokenizer like this one, of its vocabulary."""
        return self._special | {
            "do_lower_case": self.do_lower_case,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }

    def save_pretrained(self, directory: str | Path, legacy_format: bool | None = None) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, which transformers reads back; the files' names.
        legacy_format changes nothing, for the files of every version are written."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = self.init_kwargs | {"tokenizer_class": "DistilBertTokenizer"}
        if list(self.model_input_names) != list(type(self).model_input_names):
            settings["model_input_names"] = list(self.model_input_names)
        if self.says_to_clean_up or not self.clean_up_tokenization_spaces:
            settings["clean_up_tokenization_spaces"] = self.says_to_clean_up
        if self.extra_special_tokens:
            settings["additional_special_tokens"] = self.extra_special_tokens  # the name that every version reads
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        self._tokenizer.save(str(directory / "tokenizer.json"))
        tokens = {i: token for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items()}
        last = max(tokens)  # a line is a token's number; where there is none, a later line overrules this
        lines = "".join(f"{tokens.get(i, tokens[last])}\n" for i in range(last + 1))
        (directory / "vocab.txt").write_text(lines, encoding="utf-8")
        return tuple(str(directory / name) for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt"))

    def train_new_from_iterator(
        self,
        text_iterator: Any,
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[Any] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> "DistilBertTokenizer":
        """A tokenizer of the same settings and special tokens, whose WordPiece vocabulary is made of texts.

        text_iterator: of texts, or of lists of texts. length: how many there are, for a progress bar.
        new_special_tokens: more of them. special_tokens_map: other names for those there are. kwargs: of
        `tokenizers.trainers.WordPieceTrainer`.
        """
        renamed = dict(special_tokens_map or {})
        given = self.init_kwargs
        given |= {name: renamed.get(token, token) for name, token in self._special.items()}
        extra = [renamed.get(token, token) for token in self.extra_special_tokens]
        extra += [_content(token) for token in new_special_tokens or () if _content(token) not in extra]
        new = Tokenizer(models.WordPiece(unk_token=given["unk_token"], max_input_chars_per_word=MAX_WORD))
        new.normalizer, new.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        new.decoder = self._tokenizer.decoder
        special = [renamed.get(t, t) for t in sorted(self.all_special_tokens, key=self.convert_tokens_to_ids)]
        special += [token for token in extra if token not in special]
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, **kwargs)
        new.train_from_iterator(text_iterator, trainer, length)
        new.post_processor = _around(new, given["cls_token"], given["sep_token"])
        cleans = True if self.says_to_clean_up else None if self.clean_up_tokenization_spaces else False
        return type(self)(
            tokenizer=new,
            model_input_names=self.model_input_names,
            extra_special_tokens=extra,
            clean_up_tokenization_spaces=cleans,
            **given,
        )

    def lowered(self) -> "DistilBertTokenizer":
        """A copy that lowers texts first, but for the special tokens in them; the same where it does so anyway.

        Source: do_lower_case of sentence-transformers.
        """
        normalizer = self._tokenizer.normalizer
        if isinstance(normalizer, normalizers.BertNormalizer) and normalizer.lowercase:
            return self
        made = copy.copy(self)
        made._tokenizer = _copy(self._tokenizer)
        steps = [normalizers.Lowercase(), *([] if normalizer is None else [normalizer])]
        made._tokenizer.normalizer = normalizers.Sequence(steps)
        return made

    # --- vocabulary ---------------------------------------------------------------------------------------------

    @property
    def backend(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` underneath."""
        return self._tokenizer

    backend_tokenizer = backend  # transformers' name

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    vocab = property(get_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """`get_added_vocab` by id, with how each is found in a text."""
        return dict(sorted(self._tokenizer.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return self.get_added_vocab()

    @property
    def max_len_single_sentence(self) -> int:
        """The text's own tokens that fit into model_max_length."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def get_added_vocab(self) -> dict[str, int]:
        """The tokens that are found in a text before it is cut into words, special ones and those of add_tokens."""
        return {token.content: i for i, token in sorted(self._tokenizer.get_added_tokens_decoder().items())}

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add a token, or a list of them, strings or `tokenizers.AddedToken`, behind the vocabulary; how many were new.

        Special ones are found in a text as they stand, and left out by decode(skip_special_tokens=True). The model's
        embeddings have to grow along: `model.resize_token_embeddings(len(tokenizer))`.
        """
        tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else new_tokens
        if not isinstance(tokens, (list, tuple)):
            raise TypeError(f"new_tokens must be a token or a list of them, got {type(tokens).__name__}")
        for at, token in enumerate(tokens):
            if not isinstance(token, (str, AddedToken)):
                raise TypeError(f"new_tokens[{at}] must be a string or an AddedToken, got {token!r}")
            _check_unicode(_content(token), f"new_tokens[{at}]")
        add = self._tokenizer.add_special_tokens if special_tokens else self._tokenizer.add_tokens
        return add(list(tokens))

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Add the tokens of {"extra_special_tokens": [...], "mask_token": ..., ...} that are new; how many were.

        additional_special_tokens is the older name of extra_special_tokens. With replace_extra_special_tokens, earlier
        ones remain special but are no longer listed. Raises TypeError or ValueError naming the token.
        """
        if not isinstance(special_tokens_dict, Mapping):
            raise TypeError(f"special_tokens_dict must be a dictionary, got {type(special_tokens_dict).__name__}")
        for name, value in special_tokens_dict.items():
            if name not in (*SPECIAL, *EXTRA, *ENDS):
                raise ValueError(f"{name} is no special token of this tokenizer; it has {', '.join(SPECIAL)}")
            if name in EXTRA and not isinstance(value, (list, tuple)):
                raise TypeError(f"{name} must be a list of tokens, got {value!r}")
            if name not in EXTRA and not isinstance(value, (str, AddedToken)):
                raise TypeError(f"{name} must be one token, got {value!r}")
        added = 0
        for name, value in special_tokens_dict.items():
            tokens = list(value) if name in EXTRA else [value]
            added += self.add_tokens(tokens, special_tokens=True)
            if name in EXTRA:
                kept = [] if replace_extra_special_tokens else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*kept, *map(_content, tokens)]))
            else:
                setattr(self, name, _content(value))
        return added

    @property
    def additional_special_tokens(self) -> list[str]:
        """extra_special_tokens, as transformers 4 called them."""
        return list(self.extra_special_tokens)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[str]) -> None:
        self.add_special_tokens({"additional_special_tokens": list(tokens)})

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """unk_token and the like, and the extra ones."""
        extra = {"extra_special_tokens": list(self.extra_special_tokens)} if self.extra_special_tokens else {}
        return {**self._special, **extra}

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens are put around a text, or two."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self._special.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.convert_tokens_to_ids(token) for token in self.all_special_tokens]  # type: ignore[misc]

    def _special_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special} | set(self.all_special_ids)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ValueError for what cannot be kept to."""
        if name in ("padding_side", "truncation_side"):
            _check_side(name, value)
        if name in ENDS and value is None:
            self._special = {key: token for key, token in self._special.items() if key != name}
            return
        if name in (*SPECIAL, *ENDS):
            if not isinstance(value, str) or self._tokenizer.token_to_id(value) is None:
                raise ValueError(f"{name} must be a token of the vocabulary, got {value!r}")
            first = {key: token for key, token in (self._special | {name: value}).items() if key in ENDS}
            self._special = first | self._special | {name: value}  # in transformers' order
            return
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:  # unk_token, unk_token_id, ...
        special = self.__dict__.get("_special", {})
        if name in special:
            return special[name]
        if name.removesuffix("_id") in special:
            return self._tokenizer.token_to_id(special[name.removesuffix("_id")])
        if name.removesuffix("_id") in ENDS:
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        if isinstance(tokens, str):
            found = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]

    def convert_ids_to_tokens(
        self, ids: int | list[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        def token(i: int) -> str | None:
            return self._tokenizer.id_to_token(i) if 0 <= i < 2**32 else None

        if isinstance(ids, int):
            return token(ids)
        skipped = self.all_special_ids if skip_special_tokens else ()
        return [token(int(i)) for i in ids if int(i) not in skipped]

    # --- text to ids --------------------------------------------------------------------------------------------

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of a text, or of two; kwargs: of the call."""
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    @staticmethod
    def convert_tokens_to_string(tokens: Sequence[str]) -> str:
        """The tokens' text: pieces of a word joined, and no space before punctuation."""
        return decoders.WordPiece(prefix="##").decode(list(tokens))

    def encode(self, text: str, text_pair: str | None = None, **kwargs: Any) -> list[int]:
        return self(text, text_pair, **kwargs)["input_ids"]

    def encode_ids(self, texts: Sequence[str], max_length: int | None = None, *, first_row: int = 0) -> list[list[int]]:
        """The ids of each text with special tokens, cut to max_length tokens: the fast path, without offsets.

        Raises TypeError or ValueError naming the row, counted from first_row. Of a long text only about as much is read
        as is kept; one word, or nothing but spaces, has to be read to its end.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string")
        self._forget_settings()
        room = self._room(max_length, pair=False)

        def encode(pieces: list[str]) -> list[Encoding]:
            if len(pieces) == 1:  # waking the library's threads costs more than one text
                return [self._tokenizer.encode(pieces[0], add_special_tokens=False)]
            return self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)

        if self.truncation_side == "left":  # each text is read to its end
            found = [one.ids for one in self._cut_and_encode(texts, math.inf, encode, "texts", first_row)]
            return [self._before + ids[max(0, len(ids) - room) :] + self._after for ids in found]
        encodings = self._cut_and_encode(texts, room, encode, "texts", first_row)
        return [self._before + encoding.ids[:room] + self._after for encoding in encodings]

    def __call__(
        self,
        text: Text | None = None,
        text_pair: Text | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        text_target: Text | None = None,
        text_pair_target: Text | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Tokenise a text or a list of texts (or of pairs, by text_pair or as a list of twos), as transformers' do.

        padding: True or "longest", "max_length", or False. truncation: True or "longest_first", "only_first",
        "only_second", or False; to max_length tokens, by default model_max_length; None is True if max_length is given
        and padding is not. return_attention_mask, return_token_type_ids: by default whether model_input_names has them.
        is_split_into_words: a text is a list of words; offsets then count a word's characters.
        return_overflowing_tokens: what is cut off a text follows in rows of its own, each of which begins with the last
        `stride` tokens of the one before; overflow_to_sample_mapping tells whose they are. padding_side: by default the
        tokenizer's own. return_tensors: "pt" (int64), "np" or None (lists). text_target: texts whose ids become labels.
        verbose changes nothing. Raises TypeError or ValueError naming the row.
        """
        self._forget_settings()
        if text is None and text_target is None:
            raise ValueError("You need to specify either `text` or `text_target`.")
        if text_target is not None:
            same: Any = dict(padding=padding, truncation=truncation, max_length=max_length, stride=stride)
            same |= dict(is_split_into_words=is_split_into_words, add_special_tokens=add_special_tokens)
            same |= dict(
                return_tensors=return_tensors, pad_to_multiple_of=pad_to_multiple_of, padding_side=padding_side
            )
            same |= dict(return_overflowing_tokens=return_overflowing_tokens)
            more: Any = dict(return_attention_mask=return_attention_mask, return_token_type_ids=return_token_type_ids)
            more |= dict(return_offsets_mapping=return_offsets_mapping, return_length=return_length)
            more |= dict(return_special_tokens_mask=return_special_tokens_mask)
            if text is None:
                return self(text_target, text_pair_target, **same, **more)
            found = self(text, text_pair, **same, **more)
            found["labels"] = self(text_target, text_pair_target, **same)["input_ids"]
            return found
        assert text is not None
        single = _is_of_words(text) if is_split_into_words else isinstance(text, str)
        if single and (text_pair == "" if isinstance(text, str) else text_pair in ([], ())):
            text_pair = None  # as transformers does; in a list an empty second text stays one
        if text_pair is None and not is_split_into_words and _are_pairs(text):
            text, text_pair = map(list, zip(*text, strict=True))
        texts, pairs = _as_lists(text, text_pair, single)
        if truncation is None and max_length is not None and not padding:
            truncation = True  # as transformers takes it
        strategy = _strategy(truncation or False)
        padding = False if padding == "do_not_pad" else padding
        if max_length is None and (strategy or padding == "max_length") and self.model_max_length < NO_LIMIT:
            max_length = self.model_max_length
        room = math.inf
        if strategy and max_length is not None:
            room = self._room(max_length, pair=pairs is not None, special=add_special_tokens)
        _check_side("padding_side", padding_side or "right")
        if isinstance(stride, bool) or not isinstance(stride, int):
            raise TypeError(f"stride must be an integer, got {stride!r}")
        if not 0 <= stride <= room:
            raise ValueError(f"stride is {stride}, but a row has room for {room} tokens of a text; it must be less")

        whole = is_split_into_words or return_overflowing_tokens or self.truncation_side == "left"
        encode = self._encode_words if is_split_into_words else self._encode_texts
        firsts, seconds = encode(texts, pairs, math.inf if whole else room, strategy)
        encodings: list[Encoding] = []
        samples: list[int] = []
        for row, (one, two) in enumerate(zip(firsts, seconds, strict=True)):
            if len(one) + (len(two) if two else 0) > room:
                sizes = (len(one), len(two) if two else 0)
                if two and strategy == "longest_first" and not whole:
                    sizes = self._sizes(texts[row], (pairs or [])[row], one, two, room)
                rest = stride if return_overflowing_tokens else None
                two = _as_second(two) if two and return_overflowing_tokens else two
                one, two = _truncate(one, two, sizes, int(room), strategy, row, self.truncation_side, rest)
            made = self._tokenizer.post_process(one, two, add_special_tokens)
            encodings += [made, *made.overflowing] if return_overflowing_tokens else [made]
            samples += [row] * (len(encodings) - len(samples))
        if padding:
            self._pad(encodings, padding, max_length, pad_to_multiple_of, padding_side or self.padding_side)

        data: dict[str, list] = {"input_ids": [e.ids for e in encodings]}
        if _asked(return_token_type_ids, "token_type_ids" in self.model_input_names):
            data["token_type_ids"] = [e.type_ids for e in encodings]
        if _asked(return_attention_mask, "attention_mask" in self.model_input_names):
            data["attention_mask"] = [e.attention_mask for e in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [e.special_tokens_mask for e in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [e.offsets for e in encodings]
        if return_length:
            data["length"] = [len(e) for e in encodings]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        if return_tensors is not None:
            return BatchEncoding(_to_tensors(data, return_tensors), encodings)
        if single and not return_overflowing_tokens:  # a length stays in a list, as with transformers
            return BatchEncoding({k: v[0] if isinstance(v[0], list) else v for k, v in data.items()}, encodings)
        return BatchEncoding(data, encodings)

    def _encode_words(self, texts: list, pairs: list | None, *_: Any) -> tuple[list[Encoding], list]:
        """The tokens of texts that are lists of words, and of their second texts (or None)."""

        def encode(side: list, name: str) -> list[Encoding]:
            for row, words in enumerate(side):
                if not isinstance(words, (list, tuple)):
                    raise TypeError(f"{name}[{row}] must be a list of words, got {type(words).__name__}")
                for at, word in enumerate(words):
                    _check_unicode(_check_text(word, f"{name}[{row}][{at}]"), f"{name}[{row}][{at}]")
            return self._tokenizer.encode_batch(side, is_pretokenized=True, add_special_tokens=False)

        return encode(texts, "text"), [None] * len(texts) if pairs is None else encode(pairs, "text_pair")

    def _encode_texts(
        self, texts: list[str], pairs: list[str] | None, room: float, strategy: str | None
    ) -> tuple[list[Encoding], list]:
        """The tokens of texts, at least those that `room` will leave, and of their second texts (or None)."""
        if pairs is None:
            return self._cut_and_encode(texts, room, self._batch), [None] * len(texts)
        # a side that truncation leaves whole cannot be cut beforehand
        most = {"only_first": (room, math.inf), "only_second": (math.inf, room)}.get(strategy or "", (room + 1,) * 2)
        first = self._cut_and_encode(texts, most[0], self._batch)
        return first, self._cut_and_encode(pairs, most[1], self._batch, "text_pair")

    def _batch(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def _sizes(self, text: str, pair: str, one: Encoding, two: Encoding, room: float) -> tuple[int, int]:
        """Of both texts, as far as matters: where both are long and there is an odd token, the longer keeps it."""
        enough = room + 1  # a text with fewer is whole
        while room % 2 and min(len(one), len(two)) >= enough:
            if enough > 64 * room:
                return self._compared(str(text), str(pair))
            enough *= 4
            (one,), (two,) = (self._cut_and_encode([side], enough, self._batch) for side in (text, pair))
        return len(one), len(two)

    def _compared(self, *texts: str) -> tuple[int, int]:
        """The tokens of two texts, both read piece by piece until the shorter one ends: as many as that."""
        pieces, found = [self._pieces(text) for text in texts], [0, 0]
        while True:
            side = 0 if found[0] <= found[1] else 1
            piece = next(pieces[side], None)
            if piece is None and found[0] == found[1]:
                side = 1 - side
                piece = next(pieces[side], None)
            if piece is None:
                return found[0], found[1]
            found[side] += len(self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0])

    def _pieces(self, text: str) -> Iterator[str]:
        """A text cut at spaces, where that changes no token."""
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        safe = self._can_cut() and not any(c.isspace() for token in added for c in token)
        start = 0
        while start < len(text):
            end = start + PIECE
            space = text.rfind(" ", start + 1, end) if safe and end < len(text) else -1
            end = len(text) if space < 0 else space
            yield text[start:end]
            start = end

    def _room(self, max_length: int | None, *, pair: bool, special: bool = True) -> int:
        """How many of the text's own tokens fit into max_length."""
        if max_length is None:
            return 2**62
        if isinstance(max_length, bool) or not isinstance(max_length, int):
            raise TypeError(f"max_length must be an integer, got {max_length!r}")
        extra = self._tokenizer.num_special_tokens_to_add(pair) if special else 0
        if max_length < max(extra, 1):
            raise ValueError(f"max_length is {max_length}, which does not even hold the {extra} special tokens")
        return max_length - extra

    def _template(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a single text."""
        try:
            words = ("a", "0", "!", "\u4e2d")  # a normaliser may drop one of them
            word = next((w for w in words if len(self._tokenizer.encode(w, add_special_tokens=False))), words[0])
            plain = self._tokenizer.encode(word, add_special_tokens=False).ids
            full = self._tokenizer.encode(word).ids
            self._tokenizer.encode(chr(0x12345))  # cuneiform: what stands for the unknown must be there
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises plain Exception, or panics, which is not even that
            raise ValueError(f"the tokenizer cannot encode a text: {error}") from error
        if full and max(full) >= MOST_TOKENS:
            raise ValueError(f"the tokenizer puts the id {max(full)} beside a text; there are {MOST_TOKENS} at most")
        before = next(i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
        return full[:before], full[before + len(plain) :]

    def _cut_and_encode(
        self, texts: Sequence[str], room: float, encode: Callable, name: str = "text", first_row: int = 0
    ) -> list[Encoding]:
        """Encode so much of each text that its first `room` tokens are those of the whole text.

        A long text is cut at a space, or, without one nearby, anywhere, and then only counts as long enough when the
        word that may have been cut (at most 100 tokens) is not needed. The cut doubles until there are enough tokens.
        """
        texts = [t if type(t) is str else _check_text(t, f"{name}[{row}]") for row, t in enumerate(texts, first_row)]
        chars = CHARS_PER_TOKEN * (room + 8)
        if max(map(len, texts), default=0) <= 2 * chars or not self._can_cut():
            return self._encode_checked(texts, encode, name, range(first_row, first_row + len(texts)))
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        longest = max(MAX_WORD, getattr(self._tokenizer.model, "max_input_chars_per_word", 0))
        slack = longest + max(map(len, added), default=0)
        space_is_safe = not any(c.isspace() for token in added for c in token)
        results: list[Encoding | None] = [None] * len(texts)
        pending = list(range(len(texts)))
        while pending:
            pieces: list[str] = []
            needed: list[float] = []
            for row in pending:
                text = texts[row]
                if len(text) <= 2 * chars:
                    pieces.append(text)
                    needed.append(0)
                    continue
                space = text.rfind(" ", int(chars) // 2, int(chars)) if space_is_safe else -1
                pieces.append(text[: int(chars) if space < 0 else space])
                needed.append(room + (slack if space < 0 else 0))
            found = self._encode_checked(pieces, encode, name, [first_row + row for row in pending])
            for row, need, encoding in zip(pending, needed, found, strict=True):
                if len(encoding) >= need:
                    results[row] = encoding
            pending = [row for row in pending if results[row] is None]
            chars *= 2
        return results  # type: ignore[return-value]

    def _can_cut(self) -> bool:
        normalizer = self._tokenizer.normalizer
        steps = [*cast(Any, normalizer)] if isinstance(normalizer, normalizers.Sequence) else [normalizer]
        by_character = normalizers.BertNormalizer, normalizers.Lowercase, type(None)
        return isinstance(self._tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer) and all(
            isinstance(step, by_character) for step in steps
        )

    def _encode_checked(self, texts: list[str], encode: Callable, name: str, rows: Sequence[int]) -> list[Encoding]:
        try:
            return encode(texts)
        except TypeError:  # the library refuses the whole batch; name the text
            for row, text in zip(rows, texts, strict=True):
                _check_unicode(text, f"{name}[{row}]")
            raise

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Texts already tokenised as one batch, as transformers' data collators ask for it.

        encoded_inputs: a dictionary a text, in a list, or one dictionary of lists; with input_ids. attention_mask,
        token_type_ids and special_tokens_mask are padded along; what else there is, such as labels, stays as it is.
        padding, max_length, pad_to_multiple_of, return_tensors: as when it is called. padding_side: by default the
        tokenizer's own. return_attention_mask: by default true. Raises ValueError naming the row.
        """
        side = self.padding_side if padding_side is None else padding_side
        _check_side("padding_side", side)
        data = _by_name(encoded_inputs)
        data |= {name: _plain(data[name]) for name in PADDED & data.keys()}
        ids = data.get("input_ids")
        if not isinstance(ids, list):
            raise ValueError(f"the texts to pad need input_ids; they have {', '.join(map(str, data)) or 'nothing'}")
        if single := bool(ids) and not isinstance(ids[0], list):
            data = {name: [values] for name, values in data.items()}
        ids = data["input_ids"]
        if return_attention_mask is not False:
            data.setdefault("attention_mask", [[1] * len(row) for row in ids])
        fills = dict.fromkeys(PADDED, 0) | {"input_ids": self.pad_token_id, "special_tokens_mask": 1}
        if padding and padding != "do_not_pad":
            if padding == "max_length" and max_length is None and self.model_max_length < NO_LIMIT:
                max_length = self.model_max_length
            length = self._padded_length([len(row) for row in ids], padding, max_length, pad_to_multiple_of)
            for name in fills.keys() & data.keys():
                if len(data[name]) != len(ids):
                    raise ValueError(f"{len(ids)} rows of input_ids, but {len(data[name])} of {name}")
                for row, (values, own) in enumerate(zip(data[name], ids, strict=True)):
                    if len(values) != len(own):
                        raise ValueError(f"row {row}: {len(own)} input_ids, but {len(values)} of {name}")
                more = [[fills[name]] * (length - len(row)) for row in ids]
                pairs = zip(data[name], more, strict=True)
                data[name] = [own + rest if side == "right" else rest + own for own, rest in pairs]
        if single:
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding({name: as_tensor(name, v, return_tensors) for name, v in data.items()})

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 at special tokens: at those there are, or at those that would be put around the texts."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(int(i) in special) for i in token_ids_0]
        second = [] if token_ids_1 is None else [*[0] * len(token_ids_1), 1]
        return [1, *[0] * len(token_ids_0), 1, *second]

    def _pad(
        self, encodings: list[Encoding], padding: bool | str, max_length: int | None, multiple: int | None, side: str
    ) -> None:
        _check_side("padding_side", side)
        length = self._padded_length([len(e) for e in encodings], padding, max_length, multiple)
        for encoding in encodings:
            encoding.pad(length, direction=side, pad_id=self.pad_token_id, pad_token=self.pad_token)

    def _padded_length(
        self, lengths: list[int], padding: bool | str, max_length: int | None, multiple: int | None
    ) -> int:
        for name, number in (("max_length", max_length), ("pad_to_multiple_of", multiple)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise TypeError(f"{name} must be an integer, got {number!r}")
        if (max_length is not None and max_length < 0) or (multiple is not None and multiple < 1):
            raise ValueError(f"cannot pad to max_length {max_length} in multiples of {multiple}")
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding must be True, 'longest', 'max_length' or False, got {padding!r}")
        if padding == "max_length":
            if max_length is None:
                raise ValueError("padding='max_length' needs max_length, for the tokenizer has no model_max_length")
            length = max_length
        else:
            length = max(lengths, default=0)
        if multiple:
            length = -(-length // multiple) * multiple
        if length > MOST_TOKENS:
            raise ValueError(f"cannot pad to {length} tokens; the most is {MOST_TOKENS}")
        return length

    # --- ids to text --------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> Any:
        """Text of token ids (a list, array or tensor), with spaces before punctuation removed as in transformers 4; of
        rows of ids a list of texts. spaces_between_special_tokens changes nothing, as there."""
        if _has_rows(token_ids):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in token_ids]
        ids = np.asarray(token_ids).reshape(-1).tolist()
        if skip_special_tokens:
            special = self._special_ids()
            ids = [i for i in ids if i not in special]
        size = len(self)
        for i in ids:
            if not isinstance(i, (int, float)):
                raise TypeError(f"token ids are integers, got {i!r}")
        tokens = [self._tokenizer.id_to_token(int(i)) if 0 <= i < 2 * size + 2**16 else None for i in ids]
        for i, token in zip(ids, tokens, strict=True):
            if token is None:
                raise ValueError(f"{i} is not the id of a token; there are {len(self)}")
        text = " ".join(map(str, tokens)).replace(" ##", "")
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.cleaned(text) if clean else text

    @staticmethod
    def cleaned(text: str) -> str:
        """Without the spaces before punctuation and in contractions."""
        for spaced, joined in _CLEAN_UP:
            text = text.replace(spaced, joined)
        return text

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        return [self.decode(ids, **kwargs) for ids in sequences]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, model_max_length={self.model_max_length})"


# transformers' clean_up_tokenization, in its order
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


_ARGUMENTS = frozenset(inspect.signature(DistilBertTokenizer.__init__).parameters)


def _check_names(special_tokens: Mapping[str, Any]) -> None:
    if unknown := special_tokens.keys() - {*SPECIAL, *ENDS, *IGNORED}:
        raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")


def _has_rows(ids: Any) -> bool:
    """Whether ids are a batch of rows."""
    if hasattr(ids, "ndim"):
        return ids.ndim == 2
    return isinstance(ids, (list, tuple)) and bool(ids) and (isinstance(ids[0], (list, tuple)) or np.ndim(ids[0]) == 1)


def _around(tokenizer: Tokenizer, cls: str, sep: str) -> processors.TemplateProcessing:
    """BERT's special tokens around a text, or between two."""
    return processors.TemplateProcessing(
        single=[cls, "$A:0", sep],
        pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def _listed(tokens: Any) -> list[Any]:
    """Extra special tokens as they may be told: a list, a dictionary of names, or none."""
    if isinstance(tokens, (str, AddedToken)):
        raise TypeError(f"extra special tokens must be a list, got {tokens!r}")
    return [*(tokens.values() if isinstance(tokens, Mapping) else tokens or ())]


def _check_flags(settings: dict[str, Any]) -> None:
    """TypeError for a switch of BERT's normaliser that is none; strip_accents may be None."""
    for name in ("do_lower_case", "tokenize_chinese_chars", "strip_accents"):
        value = settings.get(name, False)
        if not isinstance(value, bool) and not (value is None and name == "strip_accents"):
            raise TypeError(f"{name} must be true or false, got {value!r}")


def _copy(tokenizer: Tokenizer | None) -> Tokenizer:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer must be a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
    _check_vocabulary(tokenizer, "the tokenizer")
    return Tokenizer.from_str(tokenizer.to_str())


def _check_vocabulary(tokenizer: Tokenizer, where: Any) -> None:
    """Raise ValueError for what the library would find late, or never."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    token = max(vocab, key=vocab.__getitem__, default="")
    if vocab and vocab[token] >= MOST_TOKENS:
        raise ValueError(f"{where} gives {token!r} the id {vocab[token]}; ids up to {MOST_TOKENS - 1} are supported")
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and unknown not in vocab:
        raise ValueError(f"{where} says that unk_token is {unknown!r}, which its vocabulary lacks")
    number = None if unknown is None else vocab[unknown]
    # which of them the library takes is chance
    if same := [token for token, i in vocab.items() if i == number and token != unknown]:
        raise ValueError(f"{where} gives {unknown!r} and {same[0]!r} the same id {number}")


def _check_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        hint = "; lists of words need is_split_into_words=True" if isinstance(text, (list, tuple)) else ""
        raise TypeError(f"{name} must be a string, got {type(text).__name__} {str(text)[:40]!r}{hint}")
    return str(text)


def _check_side(name: str, side: Any) -> None:
    if side not in ("right", "left"):
        raise ValueError(f"{name} must be right or left, got {side!r}")


def _is_of_words(text: Any) -> bool:
    """Whether a list is one text's words, and not one of such lists."""
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"with is_split_into_words a text is a list of words, got {type(text).__name__}")
    return not text or not isinstance(text[0], (list, tuple))


def _content(token: Any) -> Any:
    return token.content if isinstance(token, AddedToken) else token


def _are_pairs(text: Any) -> bool:
    """Whether a list holds pairs of texts."""
    rows = text if isinstance(text, (list, tuple)) else []
    twos = all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows)
    return bool(rows) and twos and all(isinstance(side, str) for row in rows for side in row)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate ({text[error.start]!r} at character {error.start}), which is not text; "
            "decode the source with errors='replace'"
        ) from error


def _as_lists(text: Text, text_pair: Text | None, single: bool) -> tuple[list, list | None]:
    if single:
        if text_pair is not None and (isinstance(text_pair, str) != isinstance(text, str)):
            raise TypeError(
                f"text is one {type(text).__name__}, so text_pair must be one too, got {type(text_pair).__name__}"
            )
        return [text], None if text_pair is None else [text_pair]
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
    if text_pair is None:
        return list(text), None
    if not isinstance(text_pair, (list, tuple)) or len(text_pair) != len(text):
        raise ValueError(f"text has {len(text)} rows, so text_pair must be a list of as many")
    return list(text), list(text_pair)


def _asked(wanted: bool | None, usual: bool) -> bool:
    return usual if wanted is None else bool(wanted)


def _strategy(truncation: bool | str) -> str | None:
    names = {True: "longest_first", False: None, "do_not_truncate": None}
    if truncation in ("longest_first", "only_first", "only_second"):
        return str(truncation)
    if not isinstance(truncation, (bool, str)) or truncation not in names:
        raise ValueError(f"truncation must be a bool, longest_first, only_first or only_second, got {truncation!r}")
    return names[truncation]


def _truncate(
    one: Encoding,
    two: Encoding | None,
    whole: tuple[int, int],
    room: int,
    strategy: str | None,
    row: int,
    side: str,
    stride: int | None,
) -> tuple[Encoding, Encoding | None]:
    """Both texts' tokens cut to `room`. whole: how many they were, which decides whose are cut. stride: None, or how
    many tokens of a piece the next one of the rest repeats."""
    n1, n2 = whole
    if strategy == "longest_first" and two is not None:
        # the longer gives way first; where both are long, each gets half and the longer one the odd token
        short = min(n1, n2)
        long = room - short if 2 * short < room else room - room // 2
        short = room - long
        n1, n2 = (short, long) if n1 <= n2 else (long, short)
    elif room == 0:
        n1 = n2 = 0
    elif strategy == "only_second" and two is None:
        raise ValueError(f"row {row} cannot be cut to max_length by only_second: it has one text")
    elif (left := room - (n1 if strategy == "only_second" else n2)) < 1:
        raise ValueError(f"row {row} cannot be cut to max_length by {strategy}: the other text alone is too long")
    elif strategy == "only_second":
        n2 = left
    else:
        n1 = left
    for encoding, most in ((one, n1), (two, n2)):
        if encoding is not None:
            if stride and len(encoding) > most and stride >= most:
                raise ValueError(
                    f"row {row}: {most} tokens of a text are kept, too few for the next piece to share {stride}"
                )
            encoding.truncate(most, stride=stride or 0, direction=side)
    if two is None or stride is not None:
        return one, two
    return _without_rest(one), _without_rest(two)


def _as_second(encoding: Encoding) -> Encoding:
    """With the type of a second text, which the library gives the first piece alone."""
    state = json.loads(encoding.__getstate__()) | {"type_ids": [1] * len(encoding)}
    second = Encoding()
    second.__setstate__(json.dumps(state).encode())
    return second


def _without_rest(encoding: Encoding) -> Encoding:
    """Without what was cut off, which the library keeps, and of a pair combines each piece with each."""
    state = json.loads(encoding.__getstate__())
    if not state["overflowing"]:
        return encoding
    plain = Encoding()
    plain.__setstate__(json.dumps(state | {"overflowing": []}).encode())
    return plain


def _by_name(encoded: Any) -> dict[str, Any]:
    """A dictionary of lists, of one or of a list of dictionaries with the same names."""
    if isinstance(encoded, Mapping):
        return dict(encoded)
    if not isinstance(encoded, (list, tuple)) or not all(isinstance(row, Mapping) for row in encoded):
        raise TypeError(f"pad takes dictionaries with input_ids, or a list of them, got {type(encoded).__name__}")
    names = list(encoded[0]) if encoded else []
    for row, one in enumerate(encoded):
        if missing := [name for name in names if name not in one]:
            raise ValueError(f"row {row} has no {missing[0]}, which row 0 has")
    return {name: [row[name] for row in encoded] for name in names}


def _plain(values: Any) -> Any:
    """Tensors and arrays, also those in a list, as lists and numbers."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values


def _to_tensors(data: dict[str, list], kind: str) -> dict[str, Any]:
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {kind!r}")
    arrays = {}
    for name, rows in data.items():
        if len({len(row) if isinstance(row, list) else 0 for row in rows}) > 1:
            raise ValueError("the texts have different numbers of tokens; a tensor of them needs padding=True")
        array = np.array(rows, dtype=np.int64)
        if not rows:
            array = array.reshape(0, 0)
        arrays[name] = torch.from_numpy(array) if kind == "pt" else array
    return arrays
