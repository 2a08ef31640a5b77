"""The pages that a person reads: short, with links, commands, snippets and numbers that are true."""

import csv
import dataclasses
import inspect
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import envs
import evaluate
import experiment
import train_lstm
import train_s5

ROOT = Path(__file__).resolve().parent.parent
# page: (lines, words) at most
LIMITS = {"README.md": (100, 900), "CONTRIBUTING.md": (40, 600), "results/README.md": (165, 1500),
          "results/NOTES.md": (150, 1200), "results/paper/README.md": (40, 250),
          "benchmarks/README.md": (165, 1250)}
PAGES = sorted(LIMITS)
TRAINERS = {"train_s5.py": train_s5, "train_lstm.py": train_lstm}
PYTEST_AND_RUFF = ("pytest", "venv", "pip")


def read(page: str) -> str:
    return (ROOT / page).read_text()


def words(text: str) -> int:
    """Number of words, code included; a word has a letter or a digit."""
    return sum(bool(re.search(r"[A-Za-z0-9]", word)) for word in text.split())


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, without the line below its head."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> list[list[str]]:
    """Every command that starts with python, split as a shell does, from the word after python on."""
    text = re.sub(r"\\\n\s*", " ", text)  # a command may go on in the next line
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`(python [^`]*)`", text)]
    lines = [line.strip() for line in re.findall(r"^    (.*python .*)$", text, re.M)]
    found = [part.strip() for line in [*inline, *lines] for part in line.split("&&")]
    return [shlex.split(part, comments=True)[1:] for part in found if part.startswith("python ")]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def flags_of(script: str) -> set[str]:
    """The flags of a script of this repository."""
    if script in TRAINERS:
        kinds = (TRAINERS[script].Config, experiment.Options)
        fields = [field for kind in kinds for field in dataclasses.fields(kind)]
        names = {field.name for field in fields}
        names |= {f"no-{field.name}" for field in fields if field.type in (bool, "bool")}
        return {"--" + name.replace("_", "-") for name in names}
    if script == "evaluate.py":
        return {"--" + name.replace("_", "-") for name in inspect.signature(evaluate.evaluate).parameters}
    source = read(script)
    written = set(re.findall(r"\"(--[a-z][a-z-]*)\"", source))
    for name in re.findall(r"^    (\w+): .*=", source, re.M):  # fields of a dataclass for tyro
        written |= {"--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")}
    helpers = [f"benchmarks/{name}.py" for name in ("common", "runs")] if script.startswith("benchmarks/") else []
    return written.union(*(re.findall(r"\"(--[a-z][a-z-]*)\"", read(path)) for path in helpers))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_its_lines_fit(page):
    text, (most_lines, most_words) = read(page), LIMITS[page]
    assert len(text.splitlines()) <= most_lines
    assert words(text) <= most_words
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_table_has_at_most_eight_rows_and_one_number_a_cell(page):
    for head, *rows in tables(read(page)):
        columns = 7 if page == "README.md" else 6
        assert len(rows) <= 8 and len(head) <= columns, head
        assert all(len(row) == len(head) for row in rows), head
        for cell in (cell for row in rows for cell in row[1:] if re.match(r"-?[\d.,]+( \[|$)", cell)):
            assert re.fullmatch(r"-?[\d.,]+( \[-?[\d.]+, -?[\d.]+\])?", cell), cell


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_a_page_uses_plain_words(page):
    words_to_avoid = r"\b(sees|hears|told|shown|lived|meets|wanted|such|so many|the one|lanes)\b"
    prose = re.sub(r"```.*?```|`[^`]*`", "", read(page), flags=re.S)
    assert re.findall(words_to_avoid, prose) == []


def test_the_results_page_asks_at_most_eight_questions():
    heads = re.findall(r"^## (.*)$", read("results/README.md"), re.M)
    assert len(heads) <= 8
    assert all(head.endswith("?") for head in heads)


@pytest.mark.parametrize("page", PAGES)
def test_a_command_exists_with_its_flags(page):
    for command in commands(read(page)):
        if command[0] == "-m":
            assert command[1] in PYTEST_AND_RUFF
            continue
        script, *rest = command
        assert (ROOT / script).is_file(), script
        missing = {word.partition("=")[0] for word in rest if word.startswith("--")} - flags_of(script)
        assert not missing, f"{script} {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_a_flag_that_is_mentioned_alone_is_one_of_a_trainer_or_script(page):
    scripts = [*TRAINERS, "evaluate.py", *(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/*.py"))]
    known = {"--help"}.union(*map(flags_of, scripts))
    mentioned = set(re.findall(r"`[^`]*?(--[a-z][a-z-]*)", read(page)))
    assert mentioned <= known


def test_a_trainer_takes_the_flags_of_every_command():
    for page in PAGES:
        for script, *rest in commands(read(page)):
            if script in TRAINERS:
                sizes = [] if "--num-envs" in rest else ["--num-envs", "6144"]  # as on an accelerator
                experiment.parse_flags(TRAINERS[script].Config, args=[*rest, *sizes])


def test_the_snippets_of_the_readme_run_as_they_stand():
    # they train an agent: about half a minute, most of which is compiling
    code = "\n".join(snippets(read("README.md")))
    assert len(re.findall(r"^(?:from|import) ", code, re.M)) >= 4
    check = "\nassert y.shape == (100, 8, 64) and action.value.shape[0] == 1\n" \
            "assert jnp.isfinite(out['metrics']['return'][:, -1]).all()\n"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- Numbers in the README ----------------------------------------------------------------------
def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(name: str, **wanted: str) -> dict[str, str]:
    """The only row of results/NAME with these values."""
    [row] = [row for row in rows_of(name) if all(row[key] == value for key, value in wanted.items())]
    return row


def described(row: dict[str, str], value: str, digits: int) -> dict[str, str]:
    """A row of a CSV file as the README writes it."""
    number = f"{float(row[value]):.{digits}f}"
    bounds = [float(row[name] or "nan") for name in ("low", "high")]
    interval = "" if bounds[0] != bounds[0] else " [{:.{d}f}, {:.{d}f}]".format(*bounds, d=digits)
    paper = f"{float(row['paper']):.{digits}f}" if row["paper"] else ""
    return {"seeds": row["seeds"], "here": number + interval, "paper": paper}


def trained(run: str) -> dict[str, str]:
    return described(row_of("training.csv", run=run), "return", 0)


def reproduced(name: str, digits: int, **wanted: str) -> dict[str, str]:
    return described(row_of(f"paper/{name}.csv", **wanted), "ours", digits)


def test_every_number_of_the_results_table_is_in_its_csv_file():
    expected = {  # (task, agent) in the README: the row of a CSV file
        ("DMControl", "default"): trained("default 20 million"),
        ("DMControl", "no privileged critic"): trained("default without privileged critic 20 million"),
        ("DMControl", "vectors, GPU"): trained("default 100 million GPU"),
        ("DMControl", "S5, GPU"): trained("S5 100 million GPU"),
        ("DMControl", "LSTM, GPU"): trained("LSTM 100 million GPU"),
        ("DMControl", "no memory, GPU"): trained("no memory 100 million GPU"),
        ("MemoryChain (bsuite), 1024", "S5"): reproduced("memory", 2, memory="S5", at="1024"),
        ("projected CartPole", "S5, sysid"): reproduced(
            "metacart", 2, memory="S5", at="episodes 13 to 16"),
    }
    [table] = [table for table in tables(read("README.md")) if table[0][0] == "task"]
    head, *rows = table
    written = {tuple(row[:2]): dict(zip(head, row)) for row in rows}
    assert written.keys() == expected.keys()
    for key, row in expected.items():
        assert {name: written[key][name] for name in row} == row, key
    longest = reproduced("dmcontrol", 0, memory="S5", at="mean of the six, 500 of 500 million")
    assert f"(500 million: {longest['paper']}, here {longest['here']})" in read("README.md")


@pytest.mark.parametrize("run, log", [
    ("default 20 million", "default/metrics.csv"),
    ("default without privileged critic 20 million", "no_privileged_critic/metrics.csv"),
    ("S5 20 million", "s5/metrics.csv"),
    ("S5 100 million", "s5/metrics_100_million.csv"),
    ("S5 20 million rollouts of 500 steps", "s5/metrics_whole_trials.csv"),
    ("LSTM 20 million", "lstm/metrics.csv"),
    ("no memory 20 million", "none/metrics.csv"),
    ("S5 with sysid 20 million", "sysid/metrics.csv"),
    ("default 100 million GPU", "gpu/vector_memory/metrics.csv"),
    ("S5 100 million GPU", "gpu/plain_s5/metrics.csv"),
    ("LSTM 100 million GPU", "gpu/lstm/metrics.csv"),
    ("no memory 100 million GPU", "gpu/plain_none/metrics.csv"),
    ("S5 with sysid cartpole-swingup alone", "sysid/cartpole_s5.csv"),
    ("sysid without memory cartpole-swingup alone", "sysid/cartpole_none.csv"),
    ("S5 with sysid 100 million GPU", "gpu/s5/metrics.csv"),
    ("sysid without memory 100 million GPU", "gpu/none/metrics.csv"),
    ("S5 with sysid 100 million CPU", "sysid/hundred_million_s5.csv"),
    ("sysid without memory 100 million CPU", "sysid/hundred_million_none.csv"),
    ("default 300 million GPU", "gpu/vector_300/metrics.csv"),
    ("S5 300 million GPU", "gpu/plain_s5_300/metrics.csv"),
    ("default 283 million GPU", "gpu/vector64/metrics.csv"),
    ("sysid without memory 252 million GPU", "gpu/none64/metrics.csv"),
    ("S5 with sysid 300 million GPU", "gpu/s5_64/metrics.csv"),
    ("paper's agent 300 million GPU", "gpu/plain64/metrics.csv")])
def test_the_return_of_a_run_is_the_mean_over_the_last_tenth_of_its_log(run, log):
    rows = rows_of(log)
    last = rows[-(len(rows) // 10):]
    tasks = [name for name in last[0] if name.startswith("return/")]
    means = [sum(float(row[task]) for row in last) / len(last) for task in tasks]
    assert round(sum(means) / len(means)) == float(row_of("training.csv", run=run)["return"])


def test_the_readme_names_the_tasks_of_the_quick_start_and_its_returns():
    text = read("README.md")
    quick, results = (next(t for t in tables(text) if t[0][-1] == name) for name in ("return", "command"))
    by_agent = {row[1]: row[4].split()[0] for row in results[1:]}
    returns = {row[0]: row[-1].split()[0] for row in quick[1:]}
    assert returns["on a laptop"] == by_agent["default"]
    assert returns["H200"] == by_agent["vectors, GPU"]
    assert len(envs.TRAIN_TASKS) == 6


def test_the_paper_reaches_the_return_of_20_million_steps_after_160_million():
    curve = [row for row in rows_of("paper/reference_dmcontrol.csv")
             if row["task"] == "mean of the six" and row["memory"] == "S5"]
    ours = float(row_of("training.csv", run="default 20 million")["return"])
    steps, returns = ([float(row[name]) for row in curve] for name in ("million_frames", "return"))
    after = next(i for i, value in enumerate(returns) if value >= ours)
    share = (ours - returns[after - 1]) / (returns[after] - returns[after - 1])
    assert abs(steps[after - 1] + share * (steps[after] - steps[after - 1]) - 160) < 10


def test_the_speed_table_of_the_readme_is_that_of_the_benchmarks():
    [table] = [table for table in tables(read("README.md")) if table[0][0] == "steps per second"]
    for name, *numbers in table[1:]:
        if name.startswith("physics"):
            task = name.removeprefix("physics of ").split(",")[0]
            rows = {row["backend"]: row for row in rows_of("physics.csv")
                    if row["tasks"] == task and row["batch"] in ("512", "64")
                    and (row["backend"], row["batch"]) in (("fused", "512"), ("C-1-thread", "512"), ("mjx", "64"))}
            expected = [f"{int(rows[backend]['steps_per_s']):,}" for backend in ("fused", "C-1-thread", "mjx")]
            assert numbers == expected
        else:
            run = rows_of("gpu/speed_6144/timing.csv" if "H100" in name else "timing.csv")
            rate = statistics.median(float(row["sps"]) for row in run)
            assert abs(int(numbers[0].replace(",", "")) / rate - 1) < 0.01
