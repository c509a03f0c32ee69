"""Tokens of DNA: ids by hand, round trips, the other strand, rows of a genome, what is refused."""

from __future__ import annotations

import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from Bio.Data import CodonTable
from Bio.Seq import Seq
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models

import seqlong.configs  # noqa: F401 (what interpolations compute)
from seqlong.backbone import BackboneConfig
from seqlong.datamodules.dna.alphabet import DnaVocabulary, reverse_complement
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.labelled import LabelledData
from seqlong.datamodules.dna.splits import BlockSplit, ContigSplit
from seqlong.datamodules.dna.tokens import (
    CodonTokenizer,
    KmerTokenizer,
    TokenizerSettings,
    build_tokenizer,
    genetic_code,
    lower_share,
)
from seqlong.errors import ConfigError, DataError
from seqlong.mixers import Bidirectional, Mamba2
from seqlong.tasks import MaskedLM
from seqlong.tokenizer import command


def array(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def bases(size: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), size))


# Words


def test_ids_of_words_by_hand():
    words = KmerTokenizer(3)
    # AAA 0, AAC 1, ACG 6, CGT 27, TTT 63, each 4 more; NAA is not known, and the last base makes no word.
    assert words.encode("AAAAACACGCGTTTTNAAC") == [4, 5, 10, 31, 67, 68]
    assert words.size == 69 and words.unknown == 68 and words.letters[10] == "ACG" and words.letters[68] == "NNN"
    assert KmerTokenizer(2, overlap=True).encode("ACGNTu") == [4 + 1, 4 + 6, 20, 20, 4 + 15]
    assert words.encode("acg") == words.encode("ACG") and words.encode("UUU") == [67] and words.encode("AC") == []


def test_words_of_one_base_have_the_ids_of_bases():
    text = bases(200, 0, "ACGTUNRacgtun")
    assert KmerTokenizer(1).encode(text) == DnaVocabulary().encode(text)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("overlap", [True, False])
def test_words_against_text(k, overlap):
    words, text = KmerTokenizer(k, overlap), bases(173, 3, "ACGTACGTN")
    step = 1 if overlap else k
    found = words.encode(text)
    expected = [text[at : at + k] for at in range(0, len(text) - k + 1, step)]
    named = [words.decode([token]) for token in found]
    assert named == [word if "N" not in word else "N" * k for word in expected]


@pytest.mark.parametrize("overlap", [True, False])
def test_round_trip_of_words(overlap):
    words, text = KmerTokenizer(4, overlap), bases(120, 4)
    assert words.decode(words.encode(text)) == text
    holed = text[:50] + "N" + text[51:]
    # Overlapping words that are known still tell the bases on both sides of the N; else its whole word is lost.
    shown = words.decode(words.encode(holed))
    assert shown == (holed if overlap else text[:48] + "NNNN" + text[52:])
    assert words.decode([2, *words.encode("ACGT"), 3]) == "<bos>ACGT<eos>"
    with pytest.raises(DataError, match="found id 999, expected 0 to 260"):
        words.decode([999])


@pytest.mark.parametrize(("k", "overlap", "size"), [(1, False, 37), (3, True, 100), (4, True, 101), (6, False, 96)])
def test_the_other_strand_of_words(k, overlap, size):
    words, text = KmerTokenizer(k, overlap), array(bases(size, 5, "ACGTacgtNR"))
    turned = words.complement[words.tokens(text)[::-1]]
    assert words.tokens(reverse_complement(text)).tolist() == turned.tolist()
    assert words.complement[words.complement].tolist() == list(range(words.size))
    assert words.complement[:4].tolist() == [0, 1, 2, 3] and words.complement[-1] == words.unknown


def test_words_that_do_not_fill_a_sequence_are_others_on_the_other_strand():
    words, text = KmerTokenizer(3), array("ACGTT")  # ACG | CGT, not ACG | AAC
    assert (
        words.decode(words.tokens(reverse_complement(text)))
        == "AAC"
        != words.decode(words.complement[words.tokens(text)[::-1]])
    )


def test_illegal_letters_are_named_with_their_place():
    with pytest.raises(DataError, match="illegal letter '-' at position 3 of the sequence"):
        KmerTokenizer(2).encode("AC-GT")


def test_share_of_lower_case():
    lower = np.array([0, 0, 1, 1, 0, 1], dtype=bool)
    assert lower_share(KmerTokenizer(3), np.array([4, 4]), lower).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert lower_share(KmerTokenizer(2, True), np.array([4] * 5), lower).tolist() == [0, 0.5, 1, 0.5, 0.5]


def test_a_tokenizer_travels_to_workers_without_its_tables():
    words = KmerTokenizer(6)
    _ = words.complement, words.letters
    sent = pickle.dumps(words)
    assert len(sent) < 1000 and pickle.loads(sent).encode("ACGTAC") == words.encode("ACGTAC")


# Codons


@pytest.mark.parametrize("code", [1, 2, 11])
def test_codons_translate_as_biopython_does(code):
    codons, text = CodonTokenizer(code), bases(300, 6)
    assert codons.translate(codons.encode(text)) == str(Seq(text).translate(table=code))
    assert codons.translate(codons.encode("ATGNNN")) == "MX"


def test_codons_by_hand():
    standard, mitochondrion = CodonTokenizer(1), CodonTokenizer(2)
    assert standard.encode("ATGTGATAA") == [4 + 14, 4 + 56, 4 + 48]
    assert standard.translate(standard.encode("ATGTGATAA")) == "M**"
    assert mitochondrion.translate(mitochondrion.encode("ATGTGAAGA")) == "MW*"
    assert sorted(standard.letters[stop] for stop in standard.stops) == ["TAA", "TAG", "TGA"]
    # Code 27 has TGA for both: read as the amino acid.
    assert "TGA" in CodonTable.unambiguous_dna_by_id[27].stop_codons and genetic_code(27)["TGA"] == "W"


def test_unknown_genetic_codes_are_refused():
    with pytest.raises(ConfigError, match=r"no genetic code 7; there are: 1 Standard, .*11 Bacterial"):
        CodonTokenizer(7)


# Settings


def test_settings():
    assert build_tokenizer(TokenizerSettings()) is None
    words = build_tokenizer(TokenizerSettings("kmer", k=4, overlap=True))
    assert isinstance(words, KmerTokenizer) and (words.k, words.overlap, words.stride) == (4, True, 1)
    codons = build_tokenizer(TokenizerSettings("codon", code=11))
    assert isinstance(codons, CodonTokenizer) and codons.code == 11 and codons.frame == 3
    with pytest.raises(ConfigError, match=r"tokenizer.code=11 says nothing where data.tokenizer.kind=kmer"):
        build_tokenizer(TokenizerSettings("kmer", code=11))
    with pytest.raises(ConfigError, match="k is 11; expected 1 to 10"):
        build_tokenizer(TokenizerSettings("kmer", k=11))


def test_interpolations_of_the_model():
    config = OmegaConf.create(
        {"data": {"tokenizer": {"kind": "kmer", "k": 2}}, "y": "${ids_of:${data.tokenizer}}",
         "c": "${complement_of:${data.tokenizer}}"}
    )  # fmt: skip
    assert config.y == 21 and list(config.c) == KmerTokenizer(2).complement.tolist()
    config.data.tokenizer = None
    assert config.y == 16 and list(config.c) == [0, 1, 2, 3, 7, 6, 5, 4]


# Rows of a genome


@pytest.fixture
def make(tmp_path):
    def build(texts: dict[str, str], settings: TokenizerSettings, **more) -> GenomeData:
        path = tmp_path / "genome.fa"
        path.write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
        given = {"length": 20, "batch_size": 4, "split": BlockSplit(block_bases=500, gap_bases=10)} | more
        return GenomeData(str(path), cache_dir=str(tmp_path / "cache"), tokenizer=settings, **given)

    return build


def read(text: str, source: str, more: int) -> str:
    """The bases that a source names and ``more`` beyond, in the direction of reading."""
    _, interval, strand = source.split(":")
    start, stop = map(int, interval.split("-"))
    if strand == "+":
        return text[start : stop + more]
    return str(Seq(text[max(0, start - more) : stop]).reverse_complement())


@pytest.mark.parametrize("overlap", [True, False])
def test_rows_hold_the_words_of_the_window_and_what_follows(make, overlap):
    text = bases(6000, 1, "ACGTACGTACGTACGTN")
    words = KmerTokenizer(4, overlap)
    data = make({"a": text}, TokenizerSettings("kmer", k=4, overlap=overlap))
    strands, whole, batches = set(), 0, iter(data.train_dataloader())
    for batch in (next(batches) for _ in range(15)):
        assert batch.shape == (4, 20)
        for row, source in enumerate(batch.source):
            strands.add(source[-1])
            # With overlap a row of 20 words begins at 20 bases, else it covers 80; the target is a word further.
            found = read(text, source, 4)
            expected = words.encode(found)
            size = int((batch.segment_ids[row] > 0).sum()) if batch.segment_ids is not None else 20
            assert batch.tokens[row, :size].tolist() == expected[:size]
            assert (batch.tokens[row, size:] == 0).all() and (batch.targets[row, size:] == -1).all()
            following = [token if token != words.unknown else -1 for token in expected[1 : size + 1]]
            if batch.targets[row, size - 1] == -1 and len(following) == size:
                following[-1] = -1  # the region ends there
            else:
                whole += 1
            assert batch.targets[row, :size].tolist() == following + [-1] * (size - len(following))
            assert ((batch.loss_weight[row] > 0) == (batch.targets[row] >= 0)).all()
    assert strands == {"+", "-"} and whole > 30


def test_words_never_read_beyond_their_region(make):
    data = make({"a": bases(3000, 2)}, TokenizerSettings("kmer", k=6, overlap=True), length=32,
                split=BlockSplit(block_bases=500, gap_bases=1))  # fmt: skip
    held = [region for name in ("validation", "test") for region in data.split.regions[name]]
    marked = np.zeros(3000, dtype=bool)
    for region in held:
        marked[region.start : region.stop] = True
    reads: list[tuple[int, int]] = []
    original = data.genome.read
    data.genome.read = lambda contig, start, stop: (reads.append((start, stop)), original(contig, start, stop))[1]
    for _ in zip(data.train_dataloader(), range(20), strict=False):
        pass
    assert len(reads) >= 80 and not any(marked[start:stop].any() for start, stop in reads)


@pytest.mark.parametrize("settings", [TokenizerSettings("kmer", k=3), TokenizerSettings("kmer", k=3, overlap=True)])
def test_evaluation_covers_every_word_once(make, settings):
    texts = {"t": bases(400, 7), "v": bases(301, 8), "w": bases(50, 9), "x": "AC"}
    data = make(texts, settings, split=ContigSplit(["v", "w", "x"]), targets="same", length=20, eval_batch_size=3)
    words = data.tokenizer
    found: list[int] = []
    for batch in data.val_dataloader():
        kept = (batch.targets >= 0) & (batch.index >= 0)[:, None]
        found += batch.tokens[kept].tolist()
    expected = [token for name in "vwx" for token in words.encode(texts[name])]
    assert sorted(found) == sorted(expected)
    assert any("1 regions are shorter than a word of 3 bases, and left out: x:0-2." in note for note in data._notes())


@pytest.mark.parametrize("targets", ["same", "next"])
def test_words_of_lower_case_weigh_less_and_n_nothing(make, targets):
    text = "acgtACGTacGTNCGT" * 40
    data = make({"a": text}, TokenizerSettings("kmer", k=4), targets=targets, split=ContigSplit([]),
                soft_mask_weight=0.1, length=100, short_records="pad", batch_size=2)  # fmt: skip
    for batch, _ in zip(data.train_dataloader(), range(6), strict=False):
        for row, source in enumerate(batch.source):
            found = read(text, source, 4)[0 if targets == "same" else 4 :]
            found += "N" * (400 - len(found))
            expected = [word(found[at : at + 4]) for at in range(0, 400, 4)]
            assert batch.loss_weight[row].tolist() == pytest.approx(expected)


def word(text: str) -> float:
    return 0.0 if "N" in text else sum(0.1 if letter.islower() else 1.0 for letter in text) / 4


def test_codons_keep_the_reading_frame_of_their_record(make):
    genes = {f"g{n}": "ATG" + "GCT" * 100 + "TAA" for n in range(8)}
    data = make(genes, TokenizerSettings("codon", code=11), reverse_complement=0.0, length=30,
                split=BlockSplit(block_bases=100, gap_bases=1))  # fmt: skip
    seen = set()
    for batch, _ in zip(data.train_dataloader(), range(20), strict=False):
        seen |= set(data.tokenizer.translate(batch.tokens[batch.targets >= 0].numpy()))
    assert seen <= set("MA*") and "A" in seen


def test_words_wrap_round_a_ring(make):
    text = bases(100, 10)
    data = make({"r": text, "v": bases(99, 1)}, TokenizerSettings("kmer", k=5, overlap=True), split=ContigSplit(["v"]),
                circular=["r"], length=50, reverse_complement=0.0)  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    for row, source in enumerate(batch.source):
        start = int(source.split(":")[1].split("-")[0])
        text3 = text * 3
        assert batch.tokens[row].tolist() == data.tokenizer.encode(text3[start : start + 54])
        assert batch.targets[row].tolist() == data.tokenizer.encode(text3[start + 1 : start + 55])


def test_bits_of_floors_are_of_words(make):
    given = {"a": bases(6000, 11)}
    single = make(given, TokenizerSettings()).floors()
    words = make(given, TokenizerSettings("kmer", k=3)).floors()
    assert [floor["bits"] for floor in words] == pytest.approx([3 * floor["bits"] for floor in single])
    said = make(given, TokenizerSettings("kmer", k=3)).describe()
    assert said["unit"] == "3-mer" and said["tokenizer"]["bases"] == 3 and "unit" not in make(given, None).describe()


def test_models_that_turn_tokens_need_their_complements(make):
    data = make({"a": bases(600)}, TokenizerSettings("kmer", k=2))
    data.check_strands(KmerTokenizer(2).complement.tolist())
    with pytest.raises(ConfigError, match=r"complement=\$\{complement_of:\$\{data.tokenizer\}\}"):
        data.check_strands([0, 1, 2, 3, 7, 6, 5, 4])
    make({"a": bases(600)}, TokenizerSettings()).check_strands([0, 1, 2, 3, 7, 6, 5, 4])


def test_masked_models_take_the_symbols_of_the_data(make):
    words = make({"a": bases(600)}, TokenizerSettings("kmer", k=2))
    mixers = {"m": partial(Bidirectional, mixer=partial(Mamba2, d_state=4, head_dim=4))}
    task = MaskedLM(BackboneConfig(d_model=8, pattern="m", mixers=mixers, vocab_size=21), replacements=None)
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(vocabulary=words.vocabulary, targets="same"))
    task.setup("fit")
    assert task.replacements.tolist() == list(range(4, 20))
    fixed = MaskedLM(BackboneConfig(d_model=8, pattern="m", mixers=mixers, vocab_size=21), replacements=[4, 20])
    fixed._trainer = task._trainer
    with pytest.raises(ConfigError, match=r"task\.replacements="):
        fixed.setup("fit")


# Labelled records


@pytest.fixture
def labelled(tmp_path):
    def build(texts: list[str], settings: TokenizerSettings, **more) -> LabelledData:
        path = tmp_path / "rows.csv"
        path.write_text("sequence,label\n" + "".join(f"{text},{number % 2}\n" for number, text in enumerate(texts)))
        given = {"validation": str(path), "floors": False, "batch_size": len(texts), "eval_batch_size": len(texts)}
        return LabelledData(str(path), cache_dir=str(tmp_path), tokenizer=settings, **(given | more))

    return build


ROWS = ["ACGTAC", "TTTAAA", "ACGTACGGT", "ccnGGGt"]


@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_labelled_records_in_words(labelled, rows):
    data = labelled(ROWS, TokenizerSettings("kmer", k=3), rows=rows, length=12)
    words = data.tokenizer
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        flat = batch.tokens.flatten()
        found = {
            int(n): flat[a : b + 1].tolist() for n, a, b in zip(batch.records, batch.starts, batch.ends, strict=True)
        }
        assert found == {number: words.encode(text) for number, text in enumerate(ROWS)}
    assert any(note.startswith("train: 1 letters are not A, C, G, T or U, in 1 records") and
               "'N' at base 3 of rows.csv:5" in note for note in data._notes())  # fmt: skip


def test_labelled_records_that_are_turned(labelled):
    pairs = KmerTokenizer(3).complement.tolist()
    labelled(ROWS[:3], TokenizerSettings("kmer", k=3)).check_strands(pairs)
    labelled(ROWS, TokenizerSettings("kmer", k=3, overlap=True)).check_strands(pairs)
    with pytest.raises(ConfigError, match=r"rows.csv:5: 7 bases are no whole number of words of 3 bases"):
        labelled(ROWS, TokenizerSettings("kmer", k=3)).check_strands(pairs)
    with pytest.raises(ConfigError, match="complement"):
        labelled(ROWS, TokenizerSettings("kmer", k=3, overlap=True)).check_strands([0, 1, 2, 3, 7, 6, 5, 4])


def test_words_longer_than_a_record_are_refused(labelled):
    with pytest.raises(DataError, match=r"rows.csv:2: a sequence of 6 bases, and 2 more are shorter than one word"):
        _ = labelled(ROWS, TokenizerSettings("kmer", k=8)).parts


def test_parts_of_records_keep_the_frame(labelled):
    genes = ["ATG" + "GCT" * 40 + "TAA", "ATG" + "GCC" * 30 + "TGA"]
    data = labelled(genes, TokenizerSettings("codon"), long="crop", length=30)
    for batch, _ in zip(data.train_dataloader(), range(10), strict=False):
        assert set(data.tokenizer.translate(batch.tokens.flatten().numpy())) <= set("MA*")
    with pytest.raises(ConfigError, match=r"data.length=31 is no whole number of codons.*data.length=30"):
        _ = labelled(genes, TokenizerSettings("codon"), long="crop", length=31).parts


# Learnt pieces


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    genome = folder / "g.fa"
    genome.write_text(">a\n" + ("GATTACA" * 40 + bases(300, 2)) * 5 + "\n>b\n" + bases(2000, 3, "ACGTN") + "\n")
    assert command(["train", str(genome), "--size", "40", "--out", str(folder / "t.json")]) == 0
    return str(folder / "t.json")


def test_learnt_pieces(pieces, make):
    tokens = build_tokenizer(TokenizerSettings("bpe", file=pieces))
    assert tokens.size == 40 and tokens.encode("NRAn") == [4, 4, 5, 4]  # special tokens, N, then A, C, G, T and merges
    text = bases(500, 5, "ACGTACGTNacgt") + "GATTACA" * 3
    found = np.array(tokens.encode(text))
    assert tokens.decode(found) == text.upper() and tokens.widths(found).sum() == len(text) > 1.5 * found.size
    assert pickle.loads(pickle.dumps(tokens)).encode(text) == found.tolist()
    with pytest.raises(ConfigError, match="a token of one strand is no token of the other"):
        tokens.check_strands(list(range(40)))


def test_rows_of_learnt_pieces(pieces, make):
    text = bases(4000, 6)
    data = make({"a": text}, TokenizerSettings("bpe", file=pieces), length=50)
    batch = next(iter(data.train_dataloader()))
    assert batch.shape[1] % 64 == 0
    for row, source in enumerate(batch.source):
        expected = data.tokenizer.encode(read(text, source, 0))
        assert batch.tokens[row, : len(expected)].tolist() == expected
        assert batch.targets[row].tolist() == expected[1:] + [-1] * (batch.shape[1] - len(expected) + 1)
        assert int((batch.segment_ids[row] == 1).sum()) == len(expected)
    with pytest.raises(ConfigError, match=r"data.order=stream"):
        make({"a": text}, TokenizerSettings("bpe", file=pieces), order="stream")


def test_learnt_pieces_that_are_refused(pieces, tmp_path):
    with pytest.raises(ConfigError, match=r"needs data\.tokenizer\.file"):
        build_tokenizer(TokenizerSettings("bpe"))
    with pytest.raises(DataError, match="there is no such tokenizer"):
        build_tokenizer(TokenizerSettings("bpe", file=str(tmp_path / "none.json")))
    text = tmp_path / "text.json"
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")).save(str(text))
    with pytest.raises(DataError, match="has no pieces of A, C, G and T"):
        build_tokenizer(TokenizerSettings("bpe", file=str(text)))
    genome = tmp_path / "g.fa"
    genome.write_text(">a\nACGT\n")
    with pytest.raises(DataError, match=r"pieces for \d+ ids only, not 400"):
        command(["train", str(genome), "--size", "400", "--out", str(tmp_path / "t.json")])
