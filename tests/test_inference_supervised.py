"""Supervised variant effect: states that change, labels, folds, floors, and predictions in the VCF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pysam = pytest.importorskip("pysam")

from inference_cases import causal_model, masked_model, save_checkpoint  # noqa: E402

from seqlong.datamodules.dna.genome import Genome  # noqa: E402
from seqlong.errors import ConfigError, DataError  # noqa: E402
from seqlong.inference.strands import Strand, tokens_of  # noqa: E402
from seqlong.inference.supervised import Label, command  # noqa: E402
from seqlong.inference.truth import auroc  # noqa: E402
from seqlong.inference.variant_heads import fit_head, folds_of, groups_of, held_out, interval, plain_features  # noqa: E402
from seqlong.inference.variant_states import differences  # noqa: E402
from seqlong.inference.variants import Variant, Window, haplotype, score  # noqa: E402


def write_genome(folder: Path, size: int = 400) -> tuple[Genome, str]:
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), size))
    (folder / "ref.fa").write_text(f">one\n{letters}\n")
    return Genome.open(folder / "ref.fa", folder / "cache"), letters


def some_variants(letters: str) -> list[Variant]:
    places = (3, 90, 91, 150, 151, 152, 230, 390)
    found = [Variant(p, letters[p].encode(), b"A" if letters[p] != "A" else b"C") for p in places]
    return [*found, Variant(200, b"", b"GAT"), Variant(260, letters[260:264].encode(), b"")]


@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_shared_windows_are_those_of_whole_ones(reverse: bool, tmp_path: Path) -> None:
    genome, letters = write_genome(tmp_path)
    strand, window, spans = Strand(genome, 0, reverse), Window(128, 48), (1, 12)
    variants = [variant.on(strand) for variant in some_variants(letters)]
    for model in (causal_model(), masked_model()):
        found, likely = differences(model, strand, variants, window, spans, 2048)
        for number, variant in enumerate(variants):
            begin = window.begin(variant.start, strand) if model.causal else window.centred(variant, strand)
            stop = min(begin + window.length, strand.length)
            states = [
                model.hidden(tokens_of(haplotype(strand, begin, stop, one))[None])[0][0] for one in (None, variant)
            ]
            at, expected = variant.start - begin, []
            for span in spans:
                low, ends = at, (span, span)
                if not model.causal:
                    low, ends = max(0, at - span), (len(variant.ref) + span, len(variant.alt) + span)
                means = [rows[low : at + end].mean(0) for rows, end in zip(states, ends, strict=True)]
                expected += (means[1] - means[0]).tolist()
            np.testing.assert_allclose(found[number], expected, atol=1e-5, err_msg=str(variant))
        if model.causal:
            np.testing.assert_allclose(likely, score(model, strand, variants, window), atol=1e-8)
        else:
            assert likely is None


def test_heads_learn_what_is_there_and_folds_keep_groups_together() -> None:
    random = np.random.default_rng(0)
    start = np.sort(random.integers(0, 200, 600)).astype(np.int64)
    contig = np.zeros(600, dtype=np.int64)
    features = random.normal(size=(600, 20)).astype(np.float32)
    positive = features[:, 3] + 0.5 * random.normal(size=600) > 0.8
    groups = groups_of(contig, start, "position", 5)
    fold = folds_of(groups, 5, 0)
    assert all(len(set(fold[start == place])) == 1 for place in set(start.tolist()))
    assert np.bincount(fold).min() > 100
    said = held_out(features, positive, groups, fold)
    value, low, high = interval(positive, said, groups)
    assert value == auroc(positive, said) and 0.9 < low < value < high < 1
    noise = held_out(random.normal(size=(600, 20)).astype(np.float32), positive, groups, fold)
    assert interval(positive, noise, groups)[1] < 0.55  # a head that saw its own fold would do better than chance
    head = fit_head(features, positive, groups)
    assert np.argmax(np.abs(head.weights)) == 3
    blocks = groups_of(contig, start, "block", 5)
    assert len(set(blocks.tolist())) == 20 and (np.diff(blocks) >= 0).all()
    assert groups_of(np.array([4, 4, 9]), np.array([1, 2, 1]), "contig", 5).tolist() == [0, 0, 1]
    # A stretch where variants are damaging is known to the floor; so is a kind of substitution.
    plain = plain_features(contig, start, [(b"A", b"G" if one % 2 else b"C") for one in range(600)])
    assert auroc(start > 150, held_out(plain, start > 150, groups, fold)) > 0.95
    assert auroc(np.arange(600) % 2 == 1, held_out(plain, np.arange(600) % 2 == 1, groups, fold)) > 0.99


def test_labels() -> None:
    assert [Label.parse("X=a,b:c").of(v) for v in (["b"], ["c"], ["d"], [])] == [1, 0, -1, -1]
    assert [Label.parse("X=a").of(v) for v in (["a", "z"], ["c"], ["."], [])] == [1, 0, -1, -1]
    for text in ("X", "=a", "X=", "X=a:"):
        with pytest.raises(ConfigError, match="expected FIELD=BAD or FIELD=BAD:GOOD"):
            Label.parse(text)


def write_vcf(folder: Path, letters: str) -> Path:
    """Every base of 40 changed to each other one; those of A and T are damaging; one in ten has no label."""
    lines = [
        "##fileformat=VCFv4.2",
        "##contig=<ID=one>",
        '##INFO=<ID=K,Number=1,Type=String,Description="k">',
        '##INFO=<ID=CADD,Number=1,Type=Float,Description="c">',
        "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO",
    ]
    for place in range(100, 140):
        for number, alt in enumerate(base for base in "ACGT" if base != letters[place]):
            label = "" if (place + number) % 10 == 0 else f"K={'bad' if letters[place] in 'AT' else 'good'};"
            lines.append(f"one\t{place + 1}\t.\t{letters[place]}\t{alt}\t.\t.\t{label}CADD={number}")
    lines.append("one\t300\t.\t" + letters[299] + "\t<DEL>\t.\t.\tK=bad")
    path = folder / "v.vcf"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_learns_and_writes(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    _, letters = write_genome(tmp_path)
    checkpoint, path = save_checkpoint(tmp_path), write_vcf(tmp_path, letters)
    words = [str(path), "--ref", str(tmp_path / "ref.fa"), "--ckpt", str(checkpoint), "--device", "cpu"]
    words += ["--window", "128", "--spans", "4,16"]
    out = tmp_path / "o.vcf.gz"
    assert command([*words, "--label", "K=bad", "--output", str(out), "--save", str(tmp_path / "h.npz")]) == 0
    shown = capsys.readouterr().out
    for name in (
        "this model's states",
        "zero-shot",
        "floor: change, place",
        "CADD (",
        "5 folds by position",
    ):
        assert name in shown
    records = list(pysam.VariantFile(str(out)))
    said = {(r.pos, r.alts[0]): r.info.get("SL_DAMAGING") for r in records}
    assert records[-1].info["SL_STATUS"] == ("symbolic",) and said[300, "<DEL>"] == (None,)
    truth, values = zip(
        *((letters[pos - 1] in "AT", value[0]) for (pos, _), value in said.items() if pos < 300), strict=True
    )
    assert auroc(np.array(truth), np.array(values)) > 0.9  # REF's state is in the difference
    assert len(list((tmp_path / "cache" / "variants").glob("*.npy"))) == 1
    # The same labels from a table: the same predictions, from states that are kept.
    rows = [(r.pos, r.ref, r.alts[0], r.info.get("K")) for r in records if r.info.get("K")]
    table = "".join(f"one\t{pos}\t{ref}\t{alt}\t{kind}\n" for pos, ref, alt, kind in rows)
    (tmp_path / "t.tsv").write_text(f"#chrom\tposition\tref\talt\teffect\n{table}")
    again = [*words, "--labels", str(tmp_path / "t.tsv"), "--label", "effect=bad:good"]
    assert command([*again, "--output", str(tmp_path / "p.vcf")]) == 0
    assert {(r.pos, r.alts[0]): r.info.get("SL_DAMAGING") for r in pysam.VariantFile(str(tmp_path / "p.vcf"))} == said
    # A head that was saved predicts as it did where nothing was known.
    assert command([*words, "--head", str(tmp_path / "h.npz"), "--output", str(tmp_path / "q.vcf")]) == 0
    for record in pysam.VariantFile(str(tmp_path / "q.vcf")):
        if not record.info.get("K"):
            assert record.info["SL_DAMAGING"] == pytest.approx(said[record.pos, record.alts[0]], abs=1e-5)
    for flags, complaint in (
        (["--label", "L=bad"], "no such INFO field; it has K, CADD"),
        (["--label", "K=worse"], "all 108 labelled alleles are not damaging"),
        (["--label", "K=bad", "--folds", "60"], r"fold \d+ of 60 has"),
        (["--label", "effect=bad", "--labels", str(path)], "v.vcf:1: expected columns chrom, pos, ref, alt and effect"),
        ([], "give --label FIELD=BAD to learn from labels, or --head"),
    ):
        with pytest.raises((DataError, ConfigError), match=complaint):
            command([*words, *flags, "--output", str(tmp_path / "x.vcf")])
    with pytest.raises(ConfigError, match=r"was fitted with .*; give the same flags and model"):
        command([*words[:-1], "4", "--head", str(tmp_path / "h.npz"), "--output", str(tmp_path / "x.vcf")])
