"""Mixes: what may be written, what each image's factor is, and what that does to the shares of draws."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from catalog.balance import balancing, parse_target
from catalog.conditions import Conditions
from catalog.corpus import Corpus
from catalog.duplicates import DUPLICATES_SCHEMA, state_of
from catalog.errors import SetupError
from catalog.mix import Mix, load_mix, make_mix, mix_names, parse_mix, parse_weight, write_mix
from catalog.query import load_catalog
from catalog.sampling import ScaleRules, image_scales, level_probabilities
from catalog.schema import CATALOG_SCHEMA
from catalog.selection import CopiesUnknownError, Selection
from catalog.shares import CROP, Tally, tally
from catalog.write import merge_dataset, write_table
from ingest.spec import load_specs
from tests.commands import run
from tests.mixed_corpus import rows_of, training_rows, write_mixed

Row = dict[str, Any]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_mixed(tmp_path_factory.mktemp("mixed"))


def mix(**fields: Any) -> Mix:
    return make_mix(fields, "the mix")


def expected_shares(factor: Callable[[Row], float]) -> tuple[Counter[str], np.ndarray]:
    """Shares of draws by modality and by level, image after image."""
    by_modality: Counter[str] = Counter()
    by_level = np.zeros(6)
    for row in training_rows():
        spacing = np.array([[row[f"spacing_{axis}"] for axis in "zyx"]], float)
        side = np.array([min(row["shape_h"], row["shape_w"])])
        masses = level_probabilities(image_scales(spacing, side, CROP, ScaleRules()))[0]
        masses = masses * row["sampling_weight"] * factor(row)
        by_modality[row["modality"]] += masses.sum()
        by_level += masses
    return Counter(
        {name: mass / by_level.sum() for name, mass in by_modality.items()}
    ), by_level / by_level.sum()


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, lambda row: 1),
        ({"where": "modality <> 'US'"}, lambda row: row["modality"] != "US"),
        # Unknown is not true, and not false either.
        ({"where": "not (spacing_z > 2)"}, lambda row: row["spacing_z"] is not None and row["spacing_z"] <= 2),
        ({"leave_out": ["chaos", "not-here"]}, lambda row: row["dataset"] != "chaos"),
        (
            {"weights": [{"by": "modality", "factors": {"MRI": 3, "US": 0}}]},
            lambda row: {"MRI": 3, "US": 0}.get(row["modality"].split("/")[0], 1),
        ),
        (
            {
                "where": "list_contains(body_part, 'chest')",
                "weights": [
                    {"where": "spacing_z > 2", "factor": 0.5},
                    {"by": "da_level", "factors": {0: 4, 5: 0.1}},
                    {"by": "dataset", "factors": {"ixi": 2}},
                ],
            },
            lambda row: (
                ("chest" in row["body_part"])
                * (0.5 if (row["spacing_z"] or 0) > 2 else 1)
                * {0: 4, 5: 0.1}.get(row["da_level"], 1)
                * (2 if row["dataset"] == "ixi" else 1)
            ),
        ),
    ],
)
def test_shares_are_those_of_counting_image_by_image(corpus: Corpus, fields: Row, factor: Any) -> None:
    counted = tally(corpus, Selection(corpus, mix(**fields)))
    rows = training_rows()
    left = [row for row in rows if factor(row) > 0]
    assert counted.images == (len(rows), len(left))
    people = [{(row["dataset"], row["subject"]) for row in some} for some in (rows, left)]
    assert counted.subjects == tuple(map(len, people))
    for when, one in (("before", lambda row: 1), ("after", factor)):
        by_modality, by_level = expected_shares(one)
        found = {row["modality"]: row[when] for row in counted.groups("modality")}
        assert found == pytest.approx({name: by_modality[name] for name in found}, abs=1e-12)
        assert [row[when] for row in counted.levels()] == pytest.approx(by_level, abs=1e-12)


EARLIER = Mix(where="key <> '001'", weights=(parse_weight("spacing_z > 2 = 0.3"),))


@pytest.fixture(scope="module")
def plain(corpus: Corpus) -> Tally:
    return tally(corpus, Selection(corpus, Mix()))


@pytest.fixture(scope="module")
def earlier(corpus: Corpus) -> Tally:
    return tally(corpus, Selection(corpus, EARLIER))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("modality", ["CT", "MRI", "US", "XR"]),
        ("dataset", ["amos", "busi", "chaos", "ixi"]),
        ("dimension", [2, 3]),
    ],
)
def test_a_balanced_mix_has_the_shares_asked_for(
    corpus: Corpus, earlier: Tally, column: str, values: list[Any], data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(values), min_size=1, unique=True))
    parts = data.draw(st.lists(st.integers(0, 100), min_size=len(names) + 1, max_size=len(names) + 1))
    complete = len(names) == len(values)
    parts[-1] = 0 if complete else max(parts[-1], 1)
    assume(sum(parts) > 0)
    shares = {name: part / sum(parts) for name, part in zip(names, parts, strict=False)}
    text = f"{column}: " + ", ".join(f"{name}={share!r}" for name, share in shares.items())
    rule = balancing(earlier, parse_target(text))
    balanced = EARLIER.model_copy(update={"weights": (*EARLIER.weights, rule)})
    found: Counter[Any] = Counter()
    for row in tally(corpus, Selection(corpus, parse_mix(balanced.as_yaml(), "x"))).groups(column):
        name = row[column].split("/")[0] if column == "modality" else row[column]
        found[name] += row["after"]
    assert {name: found[name] for name in shares} == pytest.approx(shares, abs=1e-7)


def test_levels_are_balanced_as_they_are_drawn_after_scaling(corpus: Corpus, plain: Tally) -> None:
    rule = balancing(plain, parse_target("da_level: 0=0.25, 5=0.3"))
    after = tally(corpus, Selection(corpus, mix(weights=[rule.model_dump()])))
    found = {row["da_level"]: row["after"] for row in after.levels()}
    assert (found[0], found[5]) == pytest.approx((0.25, 0.3), abs=1e-7)
    with pytest.raises(
        SetupError, match=r"no factors give da_level .*random scaling moves images.*mix show all"
    ):
        balancing(plain, parse_target("da_level: 0=1, 1=0, 2=0, 3=0, 4=0, 5=0"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("modality: PET=0.2", "no image that the mix draws has modality PET.*There: CT, MRI, MRI/T1"),
        ("modality: CT=0.5, MRI=0.5", "add US=0, XR=0"),
        ("dimension: 2=0.3, 3=0.3", "add up to 0.6, and there is no other value.*Make them add up to 1"),
        ("modality: MRI=0.2, MRI/T1=0.2", "MRI/T1 has two shares, or one within MRI"),
        ("modality: CT=0.6, MRI=0.6", r"add up to 1\.2"),
        ("modality: CT=1.5", "a share is 0 to 1"),
        ("modality: CT=nan", "a share is 0 to 1"),
        ("modality: CT=0.1, CT=0.2", "CT has two shares"),
        ("body_part: head=0.1", "the column is one of modality, dataset, dimension, da_level"),
        ("da_level: high=0.1", "no value=share"),
        ("CT=0.4", "write .modality: CT=0.4"),
    ],
)
def test_an_impossible_target_is_explained(plain: Tally, target: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        balancing(plain, parse_target(target))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("random() < 0.5", r"random\(\) cannot be used"),
        ("now() > '2020-01-01'", r"now\(\) cannot be used"),
        ("hash(key) % 2 = 0", r"hash\(\) cannot be used"),
        ("key IN (SELECT key FROM images)", "one row at a time, which subquery"),
        ("row_number() OVER () = 1", "one row at a time, which window"),
        ("count(*) > 1", "cannot be used"),
        ("nothing = 1", "there is no column nothing. Columns: dataset, key"),
        ("modality = 'CT') GROUP BY (modality", "more than a condition"),
        ("true; DROP TABLE images", "syntax error"),
        ("true) UNION (SELECT * FROM images", "condition"),
        ("da_level", "this is no condition"),
        ("modality +", "syntax error"),
        ("read_text('/etc/passwd') = ''", "cannot be used"),
        ("getenv('HOME') = ''", "cannot be used"),
    ],
)
def test_a_condition_looks_at_one_row_and_nothing_else(condition: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as raised:
        Conditions([condition])
    assert condition in str(raised.value)
    with pytest.raises(SetupError, match=r"mine\.yaml: condition"):
        make_mix({"where": condition}, "mine.yaml")


def test_answers_do_not_depend_on_how_rows_come() -> None:
    table = pa.Table.from_pylist(rows_of("amos", 30) + rows_of("busi", 30), schema=CATALOG_SCHEMA)
    coded = table.set_column(
        table.column_names.index("modality"), "modality", table["modality"].dictionary_encode()
    )
    conditions = Conditions(["modality LIKE 'MRI%' -- all of them", "spacing_z > 2", "1 = 1"])
    assert conditions.columns == ["modality", "spacing_z"]
    whole = conditions.of(table)
    assert 0 < whole[0].sum() < 60
    assert whole[2].all()
    for start in range(0, 60, 7):
        pieces = conditions.of(coded.slice(start, 7))
        assert [piece.tolist() for piece in pieces] == [one[start : start + 7].tolist() for one in whole]
    assert [len(one) for one in conditions.of(table.slice(0, 0))] == [0, 0, 0]
    with pytest.raises(SetupError, match="cast"):
        Conditions(["cast(modality AS INT) = 1"]).of(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: 2\nnew: 1", "format 2 of a mix, this program knows format 1"),
        ("wher: true", "wher: Extra inputs.*Fields: format, description, where"),
        ("weights: [{where: 'true', factor: -1}]", "factor"),
        ("weights: [{by: modality, factors: {CT: .inf}}]", "factors"),
        ("weights: [{by: modality, factors: {1: 2}}]", "a modality is a text"),
        ("weights: [{by: da_level, factors: {CT: 2}}]", "a da_level is a number"),
        ("- 1", "the whole"),
        ("a: [", "is no YAML"),
        ("!!python/object/apply:os.system [true]", "is no YAML"),
        ("where: ''", "where"),
    ],
)
def test_a_wrong_file_is_explained(text: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as raised:
        parse_mix(text, "mixes/mine.yaml")
    assert "mixes/mine.yaml" in str(raised.value)


def test_a_weight_is_a_condition_and_a_factor() -> None:
    rule = parse_weight("modality = 'CT' = 0.5")
    assert (rule.where, rule.factor) == ("modality = 'CT'", 0.5)
    for wrong in ("modality = 'CT'", "0.5", "=0.5", "true=-1", "true=nan", "true=inf"):
        with pytest.raises(SetupError, match="write a condition, an equals sign and a factor"):
            parse_weight(wrong)


def test_the_fingerprint_is_of_what_is_drawn_not_of_words() -> None:
    plain = mix(leave_out=["b", "a"])
    assert plain.fingerprint == mix(leave_out={"a": "why", "b": None}, description="x").fingerprint
    assert plain.fingerprint == parse_mix(plain.as_yaml(), "x").fingerprint
    others = [mix(), mix(leave_out=["a"]), mix(leave_out=["a", "b"], dedup=True), mix(where="true")]
    rules = [{"by": "da_level", "factors": {1: 2}}, {"by": "da_level", "factors": {1: 3}}]
    others += [mix(weights=rules), mix(weights=rules[::-1])]
    assert len({plain.fingerprint, *(one.fingerprint for one in others)}) == 7
    assert parse_mix(others[-1].as_yaml(), "x") == others[-1]


def test_the_mixes_that_come_along_name_datasets_that_exist() -> None:
    specs = load_specs()
    everything, clean = (load_mix(Corpus(Path("nowhere")), name) for name in ("all", "no-benchmarks"))
    # What `show` promises of datasets that are left out by default.
    assert everything.leave_out.keys() == {name for name, spec in specs.items() if spec.left_out}
    assert clean.leave_out.keys() - everything.leave_out.keys() == {
        *("bcv-abdomen", "chaos", "flare22", "lidc-idri", "msd-liver", "ribfrac")
    }
    assert clean.leave_out.keys() >= {
        name for name, spec in specs.items() if any("MNIST3D" in note for note in spec.notes)
    }
    assert clean.leave_out.keys() <= specs.keys()
    assert all(clean.leave_out.values())


def test_a_mix_is_written_once_unless_forced(tmp_path: Path) -> None:
    corpus = write_mixed(tmp_path)
    write_mix(corpus, "mine", mix(where="true"))
    with pytest.raises(SetupError, match="--force replaces it"):
        write_mix(corpus, "mine", mix())
    assert load_mix(corpus, "mine").where == "true"
    write_mix(corpus, "mine", mix(), force=True)
    assert load_mix(corpus, "mine") == Mix()
    assert mix_names(corpus) == ["all", "no-benchmarks", "mine"]
    with pytest.raises(SetupError, match="comes with PUMIT-data"):
        write_mix(corpus, "no-benchmarks", mix(), force=True)
    for wrong in ("../evil", "", "A", ".hidden", "a/b", "x" * 65, "a.."):
        with pytest.raises(SetupError, match="cannot be the name"):
            write_mix(corpus, wrong, mix())
        with pytest.raises(SetupError, match="cannot be the name"):
            load_mix(corpus, wrong)
    with pytest.raises(
        SetupError, match=r"no mix 'min' .*Did you mean 'mine'\? Mixes: all, no-benchmarks, mine"
    ):
        load_mix(corpus, "min")


def write_groups(corpus: Corpus, members: list[tuple[int, str, str, bool]], *, told: bool = True) -> None:
    rows = [
        {"group": group, "dataset": dataset, "key": key, "kind": "exact", "kept": kept}
        for group, dataset, key, kept in members
    ]
    state = state_of(corpus) if told else {}
    schema = DUPLICATES_SCHEMA.with_metadata(DUPLICATES_SCHEMA.metadata | state)
    write_table(corpus.duplicates_file, pa.Table.from_pylist(rows, schema=schema))


@pytest.mark.parametrize("forced", [True, False])
def test_of_several_copies_one_keeps_its_weight(tmp_path: Path, forced: bool) -> None:
    corpus = write_mixed(tmp_path)
    wanted = mix(dedup=not forced, weights=[{"by": "dataset", "factors": {"amos": 2}}])
    with pytest.raises(CopiesUnknownError, match="Type `pumit-data duplicates --data"):
        Selection(corpus, wanted, dedup=forced)
    groups = [(0, "amos", "010", True), (0, "amos", "020", False), (0, "chaos", "000", False)]
    groups += [
        (1, "chaos", "038", False),
        (1, "ixi", "012", True),
        (2, "amos", "038", False),
        (2, "busi", "1", True),
    ]
    write_groups(corpus, groups)
    selection = Selection(corpus, wanted, dedup=forced)
    gone = {(dataset, key) for _, dataset, key, kept in groups if not kept}
    for dataset in corpus.datasets():
        table = load_catalog(corpus, selection.columns, [dataset])
        for piece in (table, table.slice(5, 9), table.take(list(range(table.num_rows))[::-1])):
            expected = [
                0 if (dataset, key) in gone else 2 if dataset == "amos" else 1
                for key in piece["key"].to_pylist()
            ]
            assert selection.factors(piece).tolist() == expected
    other = Selection(corpus, wanted, dedup=forced).fingerprints
    assert other == selection.fingerprints
    write_groups(corpus, groups[:-2])
    assert Selection(corpus, wanted, dedup=forced).fingerprints["duplicates"] != other["duplicates"]


def test_duplicates_of_another_catalog_are_refused(tmp_path: Path) -> None:
    corpus = write_mixed(tmp_path)
    write_groups(corpus, [])
    Selection(corpus, mix(dedup=True))
    merge_dataset(corpus, "ixi", [rows_of("ixi", 1)[0] | {"key": "late"}], [])
    with pytest.raises(CopiesUnknownError, match="before the catalog of ixi became what it is"):
        Selection(corpus, mix(dedup=True))
    write_groups(corpus, [])
    recoded = rows_of("ixi", 1)[0] | {"shard_path": "ixi/other.train.zarr", "sampling_weight": 3.0}
    merge_dataset(corpus, "ixi", [recoded], [])
    Selection(corpus, mix(dedup=True))  # another codec and another weight make no other image
    write_groups(corpus, [], told=False)
    Selection(corpus, mix(dedup=True))  # nobody says that anything changed


def test_the_commands(tmp_path: Path) -> None:
    write_mixed(tmp_path)
    arguments = ("--data", tmp_path, "--json")
    written = run(
        "pumit-data",
        *("mix", "write", "even", "--where", "dataset <> 'busi'", "--weight", "spacing_z > 5 = 0.5"),
        *("--leave-out", "chaos", "--balance", "modality: CT=0.4, MRI=0.6", "--description", "a test"),
        *arguments,
    )
    assert written.returncode == 0, written.stderr
    told = json.loads(written.stdout)
    shown = run("pumit-data", "mix", "show", "even", *arguments)
    assert json.loads(shown.stdout) == told
    shares = Counter[str]()
    for row in told["by_modality"]:
        shares[row["modality"].split("/")[0]] += row["after"]
    assert shares == pytest.approx({"CT": 0.4, "MRI": 0.6, "US": 0, "XR": 0}, abs=1e-7)
    assert told["images"]["after"] == sum(row["images_after"] for row in told["by_modality"])
    listed = json.loads(run("pumit-data", "mix", "list", *arguments).stdout)
    assert [one["name"] for one in listed] == ["all", "no-benchmarks", "even"]
    assert listed[-1]["fingerprint"] == told["fingerprint"]
    again = run("pumit-data", "mix", "write", "even", *arguments)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    page = run("pumit-data", "mix", "show", "even", "--data", tmp_path, env={"COLUMNS": "80"}).stdout
    assert "a test" in page
    assert "leaves out chaos" in page
    assert "60.0%" not in page.split("DA level")[1]
