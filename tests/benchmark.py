"""Measure what the README claims, on an idle machine, and append it to tests/results.csv.

    python tests/benchmark.py                    all parts
    python tests/benchmark.py reading peers      some of them: own reading peers robust picture

The parts reading and peers need the default data of python prepare_ocr_dataset.py.
"""

import datetime
import itertools
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import FOREIGN, ROOT, WEIGHTS, Script
from peers import READERS
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import crnn
import prepare_ocr_dataset
import train_crnn
from inference_crnn import recognize

# --------------------------------------------------------------------------------------------------
FOLDER = ROOT / "datasets" / "benchmark"  # images, csv files and models of the benchmark
RESULTS = ROOT / "tests" / "results.csv"  # a row a figure; the newest of a measure counts
DEFAULT_CSV = ROOT / "datasets" / "data.csv"  # of python prepare_ocr_dataset.py
READING_WORDS = 480  # printed words of about 100 pixels, of the part reading
REPEATS = 5  # of each timing of that part
PEERS_ROWS = 2_000  # test rows of each source, of the part peers: by default all
# --------------------------------------------------------------------------------------------------


def hardware():
    """The processor in words, and in what it computes."""
    info = Path("/proc/cpuinfo")
    name = re.search("model name\\s*: (.*)", info.read_text())[1] if info.exists() else ""
    dtype = str(crnn.compute_dtype("cpu")).removeprefix("torch.")
    return f"{os.cpu_count()} cores of {name.strip() or platform.machine()}, {dtype}"


def record(part, measure, value, runs=1):
    """Print a figure and append it to RESULTS at once, since a part takes minutes."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    value = f"{value:.4g}" if isinstance(value, float) else value
    print(f"{part}: {measure}: {value}", flush=True)
    row = dict(date=datetime.date.today().isoformat(), commit=commit, hardware=hardware())
    row |= dict(part=part, measure=measure, value=value, runs=runs)
    look = dict(mode="a", header=not RESULTS.exists(), index=False, lineterminator="\n")
    pd.DataFrame([row]).to_csv(RESULTS, **look)


def fresh(name):
    """An empty folder."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    (FOLDER / name).mkdir(parents=True)
    return FOLDER / name


def labelled(csv_path):
    """The rows of a csv, with whole paths to their images."""
    rows = crnn.add_split(crnn.read_labels(csv_path))
    return rows.assign(image_path=crnn.image_paths(rows, csv_path))


def texts_of(images, model=WEIGHTS):
    """What a model, or the weights at a path, read in images."""
    return [reading.text for reading in recognize(list(images), model)]


def exact(rows, model=WEIGHTS):
    """The percentage of rows that a model reads without error."""
    return 100 * float((rows.label == texts_of(rows.image_path, model)).mean())


def draw_code(index, fonts):
    """A five-character code over a noisy background, 200 x 50 pixels; no 0, O, 1 or I."""

    def tone(low, high):
        return tuple(random.randint(low, high) for _ in range(3))

    random.seed(index)
    code = "".join(random.choices("23456789ABCDEFGHJKLMNPQRSTUVWXYZ", k=5))
    image = Image.effect_noise((200, 50), random.randint(20, 60)).convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, tone(170, 255)), 0.6)
    draw = ImageDraw.Draw(image)
    for i, c in enumerate(code):
        glyph = Image.new("L", (60, 60))
        font = ImageFont.truetype(random.choice(fonts), random.randint(28, 38))
        ImageDraw.Draw(glyph).text((30, 30), c, font=font, fill=255, anchor="mm")
        glyph = glyph.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC)
        place = 6 + i * 36 + random.randint(-5, 5), random.randint(-9, 0)
        image.paste(tone(0, 110), place, glyph)
    for _ in range(random.randint(2, 5)):
        ends = [(random.randint(0, 200), random.randint(0, 50)) for _ in range(2)]
        draw.line(ends, fill=tone(0, 150), width=1)
    for _ in range(150):
        draw.point((random.randint(0, 199), random.randint(0, 49)), fill=tone(0, 200))
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.7))), code


def own():
    """Fine-tuning on 200 such codes in a csv with image_path, label and split; nothing tuned."""
    folder = fresh("own")
    fonts = sorted(str(p) for p in (ROOT / "myFonts" / "printed").glob("*-700.woff2"))
    rows = []
    for i in range(1000):
        image, code = draw_code(i, fonts)
        image.save(folder / f"{i:04}.png")
        split = "test" if i < 800 else "val" if i % 10 == 0 else "train"
        rows.append(dict(image_path=f"{i:04}.png", label=code, split=split))
    crnn.write_labels(pd.DataFrame(rows), folder / "own.csv")
    places = dict(DATA_CSV=str(folder / "own.csv"), MODEL_PATH=str(folder / "own.pth"))
    start = time.perf_counter()
    Script(train_crnn, INIT_WEIGHTS=str(WEIGHTS), **places).run(folder, timeout=3600)
    record("own", "fine-tuning on 200 codes, minutes", (time.perf_counter() - start) / 60)
    others = labelled(folder / "own.csv")[:800]
    for name, weights in {"as shipped": WEIGHTS, "fine-tuned on 200": folder / "own.pth"}.items():
        record("own", f"800 other codes {name}, exact in percent", exact(others, weights))


def read_by_all(rows, passes=1):
    """Read rows with each recogniser that is installed: its name, lines a second, and its csv."""
    crnn.write_labels(rows[["image_path", "label", "source"]], FOLDER / "rows.csv")
    for name in READERS:
        out = FOLDER / f"read by {name}.csv"
        command = [sys.executable, "tests/peers.py", name, FOLDER / "rows.csv", out, str(passes)]
        pipes = dict(env=dict(os.environ, PEERS_MODEL=str(WEIGHTS)), capture_output=True)
        run = subprocess.run(command, cwd=ROOT, text=True, encoding="utf-8", **pipes)
        if run.returncode not in (0, 3):
            raise SystemExit(f"{name} failed:\n{run.stderr[-2000:]}")
        if run.returncode == 3:
            print(f"{name}: {run.stdout.strip()}")
        else:
            yield name, float(run.stdout.splitlines()[-1]), out


def reading():
    """Lines a second on one core: grey images in memory of single printed words to their text."""
    rows, folder = labelled(DEFAULT_CSV), fresh("words")
    plain = (rows.source == "trdg_custom") & (rows["style"] == "plain")
    words = rows[(rows.split != "train") & plain & ~rows.label.str.contains(" ")]
    for path in words.image_path:
        with Image.open(path) as image:
            grey = crnn.scale(image.convert("L"))  # (32, W)
        if 80 <= grey.shape[1] <= 120:
            Image.fromarray(grey).save(folder / path.name)
    words = words.assign(image_path=[folder / path.name for path in words.image_path])
    words = words[words.image_path.map(Path.exists)].head(READING_WORDS)
    for name, rate, _ in read_by_all(words, REPEATS):
        record("reading", f"{name}, lines a second", rate, REPEATS)


def peers():
    """Lines read without an error by ours and by others, of two preparations the better one."""
    rows = labelled(DEFAULT_CSV)
    rows = rows[rows.split == "test"].sample(frac=1, random_state=0)
    rows = rows.groupby("source").head(PEERS_ROWS)
    foreign = labelled(FOREIGN / "labels.csv").assign(source="foreign")
    for name, _, out in read_by_all(pd.concat([rows, foreign])):
        read = pd.read_csv(out, dtype=str, keep_default_na=False)
        tables = [crnn.score_table(read.assign(prediction=read[c])) for c in ("prediction", "tall")]
        for source in tables[0].index.drop("all"):
            best = max(float(table.exact[source]) for table in tables)
            record("peers", f"{name}, {source}, exact in percent", 100 * best)


def robust():
    """Empty paper, empty boxes and ruled lines."""
    chance, paper = np.random.default_rng(0), []
    for _ in range(200):
        height, width = chance.integers(20, 80), chance.integers(20, 500)
        light = np.linspace(*chance.uniform(120, 255, 2), width)[None]
        light = light + np.linspace(0, chance.uniform(-40, 40), height)[:, None]
        noise = chance.normal(0, chance.choice([0, 2, 6, 15]), (height, width))
        paper.append(Image.fromarray((light + noise).clip(0, 255).astype(np.uint8)))
    empty = texts_of(paper).count("")
    record("robust", "images of empty paper read as nothing, of 200", empty)
    for i, image in enumerate(paper):
        (width, height), draw = image.size, ImageDraw.Draw(image)
        inset, pen = int(chance.integers(0, 1 + min(image.size) // 8)), 1 + height // 40
        if i % 2:
            box = inset, inset, width - 1 - inset, height - 1 - inset
            draw.rectangle(box, outline=0, width=pen)
        else:
            for y in range(height - 1 - inset, 0, -height // 2):
                draw.line((0, y, width, y), fill=0, width=pen)
    empty = texts_of(paper).count("")
    record("robust", "empty boxes and ruled lines read as nothing, of 200", empty)


def picture():
    """.github/reads.png, what the shipped weights read in tests/foreign, and drawn.png, samples.

    Of fonts only: nothing of EMNIST or UNIPEN is in the repository.
    """
    rows = labelled(FOREIGN / "labels.csv")
    rows = rows[rows.label.str.len() < 20].sample(20, random_state=0)
    cells = []
    for path, label, text in zip(rows.image_path, rows.label, texts_of(rows.image_path)):
        cells.append((path, [(text, "#007020" if text == label else "#c00000")]))
    prepare_ocr_dataset.contact_sheet(ROOT / ".github" / "reads.png", cells, columns=4)
    cells = []
    for source, number in dict(trdg_custom=8, handwriting=5, synthetic_math=3).items():
        drawn = (prepare_ocr_dataset.sample(source, i) for i in range(60, 200))
        styled = (each for each in drawn if len(each[1]) < 20 and each[3] != "plain")
        for image, label, _, style in itertools.islice(styled, number):
            captions = [(label, "black"), (f"{source}, {style}", "#777777")]
            cells.append((Image.fromarray(image), captions))
    prepare_ocr_dataset.contact_sheet(ROOT / ".github" / "drawn.png", cells, columns=4)


def main(*wanted):
    """Run the parts of these names, or all."""
    parts = {part.__name__: part for part in (own, reading, peers, robust, picture)}
    if not set(wanted) <= set(parts):
        raise crnn.InputError(f"choose parts among {' '.join(parts)}")
    for name in wanted or parts:
        parts[name]()


if __name__ == "__main__":
    crnn.run(main, *sys.argv[1:])
