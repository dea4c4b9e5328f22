"""Measure what the README claims, on an idle machine, and append it to tests/results.csv.

    python tests/benchmark.py                    all parts
    python tests/benchmark.py reading peers      some of them: drawing speed kills own reading peers
                                                 damaged robust memory picture

The parts reading and peers need the default data of python prepare_ocr_dataset.py.
"""

import datetime
import io
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import peers as others
import pytest
import torch
from conftest import ROOT, Script, write_csv
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

import crnn
import inference_crnn
import prepare_ocr_dataset
import train_crnn

# --------------------------------------------------------------------------------------------------
FOLDER = ROOT / "datasets" / "benchmark"  # images, csv files and models of the benchmark
RESULTS = ROOT / "tests" / "results.csv"  # a row a figure; the newest of a measure counts
DEFAULT_CSV = ROOT / "datasets" / "data.csv"  # of python prepare_ocr_dataset.py
FOREIGN = ROOT / "tests" / "foreign"  # images by other programs
WEIGHTS = ROOT / "ocr_crnn_model" / "pretrained.pth"  # that read, and that the part own starts from
REPEATS = 5  # of each timing of the parts speed and reading
DRAWING_NUMBER = 40_000  # images of the part drawing
KILLS = 5  # in drawing, and as many in training
READING_WORDS = 480  # printed words of about 100 pixels, of the part reading
PEERS_ROWS = 2_000  # test rows of each source, of the part peers: by default all
DAMAGED_FILES = 2_000  # of the part damaged
MEMORY_IMAGES = 10_000, 100_000  # of the part memory
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


def script(module, **constants):
    """A Script, see conftest.py, that only runs in processes of its own."""
    made = Script(module, pytest.MonkeyPatch())
    made.constants = constants
    return made


def fresh(name):
    """An empty folder."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    (FOLDER / name).mkdir(parents=True)
    return FOLDER / name


def drawing_in(folder, number, **constants):
    """The preparation of so many printed lines, as a Script."""
    numbers = dict.fromkeys(prepare_ocr_dataset.SOURCES, 0) | dict(trdg_custom=number)
    places = dict(DATASETS_DIR=str(folder), FONTS_DIR=str(ROOT / "myFonts"))
    return script(prepare_ocr_dataset, NUM_IMAGES=numbers, **places, **constants)


def drawing():
    """Plain printed lines, the same texts and fonts, by us and by TRDG's own command line."""
    folder = fresh("drawing")
    start = time.perf_counter()
    drawing_in(folder / "ours", DRAWING_NUMBER, STYLED=0).run(folder, timeout=3600)
    ours = DRAWING_NUMBER / (time.perf_counter() - start)
    rows = crnn.read_labels(folder / "ours" / "data.csv")
    (folder / "texts.txt").write_text("\n".join(rows.label), encoding="utf-8")
    (folder / "fonts").mkdir()
    for font in prepare_ocr_dataset.find_fonts()[0]:
        if font.kind == prepare_ocr_dataset.PRINTED and not font.held_out:
            # The only suffix that it looks for
            shutil.copy(font.path, folder / "fonts" / f"{Path(font.path).stem}.ttf")
    # Its settings nearest to ours: noise behind the text, some blur and skew.
    options = f"trdg -i {folder}/texts.txt -c {DRAWING_NUMBER} -fd {folder}/fonts -f 38 -b 0 -bl 1"
    options += f" -rbl -k 3 -rk -e png -t {os.cpu_count()} --output_dir {folder}/trdg -na 2"
    shim = "import sys; from PIL import ImageFont as f; from trdg.run import main\n"
    shim += "f.FreeTypeFont.getsize = lambda self, text: self.getbbox(text)[2:]\n"  # of Pillow 9
    shim += f"sys.argv = {options.split()!r}; main()"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", shim], check=True, capture_output=True)
    theirs = len(list((folder / "trdg").glob("*.png"))) / (time.perf_counter() - start)
    record("drawing", "plain printed lines, images a second", ours)
    record("drawing", "TRDG's command line, images a second", theirs)
    record("drawing", "times as fast as TRDG's command line", ours / theirs)


def speed():
    """Lines of 32 x 128 pixels a second in training, 64 at a time, in both precisions."""
    charset = crnn.Charset(prepare_ocr_dataset.CHARSET)
    images = torch.randint(0, 256, (64, 1, 32, 128), dtype=torch.uint8)
    targets, lengths = torch.randint(1, 100, (64, 10)), torch.full((64,), 10)
    train_crnn.INIT_WEIGHTS = None
    for train_crnn.PRECISION in ("float32", "bfloat16"):
        net = train_crnn.WithShortcut(train_crnn.make_model(charset))
        parts, seconds = train_crnn.make_optimizers(net, 10), []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            train_crnn.train_step(net, parts, images, targets, lengths)
            seconds.append(time.perf_counter() - start)
        rate = 64 / statistics.median(seconds[1:])
        record("speed", f"training in {train_crnn.PRECISION}, lines a second", rate, REPEATS)


def contents(folder):
    """Every drawn file below a folder, as bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


def killed(command, seconds):
    """Start a command and kill -9 it, with its workers, after so many seconds."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kills():
    """kill -9 at random moments of drawing and training: files and weights as of a whole run."""
    random.seed(0)
    folder = fresh("kills")
    whole = drawing_in(folder / "whole", 3_000)
    start = time.perf_counter()
    whole.run(folder)
    seconds, expected, same = time.perf_counter() - start, contents(folder / "whole"), 0
    for i in range(KILLS):
        again = drawing_in(folder / f"killed{i}", 3_000)
        killed(again.command(folder), random.uniform(0, seconds))
        again.run(folder)
        same += contents(folder / f"killed{i}") == expected
    record("kills", "drawings that end as uninterrupted", same, KILLS)

    texts = [f"{i * 7919 % 10000:04}" for i in range(512)]
    path = write_csv(folder / "data", texts, split=["train"] * 448 + ["val"] * 64)
    constants = dict(DATA_CSV=str(path), INIT_WEIGHTS=None, MIN_STEPS=0, EPOCHS=8, BATCH_SIZE=8)
    trained = script(train_crnn, MODEL_PATH=str(folder / "whole.pth"), **constants)
    start = time.perf_counter()
    trained.run(folder)
    seconds, same = time.perf_counter() - start, 0
    expected = torch.load(folder / "whole.resume.pth", weights_only=True)["net"]
    for i in range(KILLS):
        state = folder / f"killed{i}.resume.pth"
        again = script(train_crnn, MODEL_PATH=str(folder / f"killed{i}.pth"), **constants)
        killed(again.command(folder), random.uniform(0, seconds))
        again.constants["RESUME"] = state.exists()
        again.run(folder)
        weights = torch.load(state, weights_only=True)["net"]
        same += all(torch.equal(weights[name], expected[name]) for name in expected)
    record("kills", "trainings that end as uninterrupted", same, KILLS)


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
        rows.append((f"{i:04}.png", code, split))
    rows = pd.DataFrame(rows, columns=["image_path", "label", "split"])
    crnn.write_labels(rows, folder / "own.csv")
    for name, weights in (("as shipped", WEIGHTS), ("fine-tuned on 200", folder / "own.pth")):
        if name != "as shipped":
            places = dict(DATA_CSV=str(folder / "own.csv"), MODEL_PATH=str(weights))
            start = time.perf_counter()
            script(train_crnn, INIT_WEIGHTS=str(WEIGHTS), **places).run(folder, timeout=3600)
            record("own", "fine-tuning on 200 codes, minutes", (time.perf_counter() - start) / 60)
        paths = [folder / path for path in rows.image_path[:800]]
        read = [reading.text for reading in inference_crnn.recognize(paths, str(weights))]
        exact = 100 * (rows.label[:800] == read).mean()
        record("own", f"800 other codes {name}, exact in percent", float(exact))


def run_reader(name, path, core=0, tall=False, passes=1):
    """Start a recogniser on a csv, on one core. Returns the process, and where its texts go."""
    out = FOLDER / "peers" / f"{Path(path).stem}.{name.replace(' ', '_')}{'.tall' * tall}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PEERS_CORE=str(core), PEERS_TALL="1" if tall else "")
    command = [sys.executable, str(ROOT / "tests" / "peers.py"), name, str(path), str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([*command, str(passes)], env=environment, cwd=ROOT, **pipes), out


def finished(name, process):
    """The last line that a recogniser printed: lines a second, or why it is missing."""
    output, errors = process.communicate()
    if process.returncode not in (0, 3):
        raise SystemExit(f"{name} failed:\n{errors[-2000:]}")
    return output.strip().splitlines()[-1]


def reading():
    """Lines a second on one thread: grey images in memory of single printed words to their text."""
    rows, words, folder = crnn.add_split(crnn.read_labels(DEFAULT_CSV)), [], fresh("words")
    plain = (rows.source == "trdg_custom") & (rows["style"] == "plain")
    for row in rows[(rows.split != "train") & plain & ~rows.label.str.contains(" ")].itertuples():
        with Image.open(DEFAULT_CSV.parent / row.image_path) as image:
            grey = crnn.scale(image.convert("L"), crnn.View())  # (32, W)
        if 80 <= grey.shape[1] <= 120 and len(words) < READING_WORDS:
            name = Path(row.image_path).name
            Image.fromarray(grey).save(folder / name)
            words.append((name, row.label, "words"))
    table = pd.DataFrame(words, columns=["image_path", "label", "source"])
    crnn.write_labels(table, folder / "words.csv")
    rates = {}
    for name in others.READERS:
        rate = finished(name, run_reader(name, folder / "words.csv", passes=REPEATS)[0])
        if rate.startswith("not"):
            print(f"reading: {name}: {rate}")
            continue
        rates[name] = float(rate)
        record("reading", f"{name}, lines a second", rates[name], REPEATS)
        if name != "ours":
            record(
                "reading", f"ours, times as fast as {name}", rates["ours"] / rates[name], REPEATS
            )


def peers():
    """Lines read without an error by ours and by others, of two preparations the better one."""
    rows = crnn.add_split(crnn.read_labels(DEFAULT_CSV))
    rows = rows[rows.split == "test"].sample(frac=1, random_state=0)
    rows = rows.groupby("source").head(PEERS_ROWS)
    foreign = crnn.read_labels(FOREIGN / "labels.csv").assign(source="foreign")
    foreign["image_path"] = [
        os.path.relpath(FOREIGN / p, DEFAULT_CSV.parent) for p in foreign.image_path
    ]
    path, shown = DEFAULT_CSV.parent / ".peers.csv", pd.concat([rows, foreign])
    crnn.write_labels(shown[["image_path", "label", "source"]], path)
    for name in others.READERS:
        running = [run_reader(name, path, core, tall) for core, tall in enumerate((False, True))]
        lines = [finished(name, process) for process, _ in running]
        if lines[0].startswith("not"):
            print(f"peers: {name}: {lines[0]}")
            continue
        read = [pd.read_csv(out, dtype=str, keep_default_na=False) for _, out in running]
        tables = [crnn.score_table(texts) for texts in read]
        for source in tables[0].index.drop("all"):
            best = max(tables, key=lambda table: table.exact[source])
            record("peers", f"{name}, {source}, exact in percent", 100 * float(best.exact[source]))
            record("peers", f"{name}, {source}, CER in percent", 100 * float(best.CER[source]))


def run_inference(path, timeout=600):
    """inference_crnn.py on a path in a process of its own; its peak memory is its last word."""
    code = (
        f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import inference_crnn as i\n"
        f"sys.stdout.reconfigure(encoding='utf-8'); i.REPORT_DIR = None\n"
        f"i.MODEL_PATH = i.PRETRAINED = {str(WEIGHTS)!r}; status = i.main([{str(path)!r}])\n"
        f"print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    environment = dict(os.environ, PYTHONIOENCODING="utf-8")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=FOLDER, timeout=timeout, env=environment, **pipes)


def damage(data, kind):
    """The bytes of an image file: cut off, with flipped bits, a hostile header, noise, or whole."""
    data = bytearray(data)
    if kind == 0:
        return data[: random.randint(0, len(data))]
    if kind == 1:
        for _ in range(random.randint(1, 30)):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    if kind == 2:
        for i in range(4, min(40, len(data))):
            if random.random() < 0.3:
                data[i] = random.choice([0, 255, random.randrange(256)])
    return random.randbytes(random.randint(0, 3000)) if kind == 3 else data


def damaged():
    """One run over mutated image files; a fifth are whole, under the name of another format."""
    random.seed(0)
    folder, sources = fresh("damaged"), sorted(FOREIGN.glob("*.png"))
    endings = dict(PNG="png", JPEG="jpg", WEBP="webp", TIFF="tif", BMP="bmp", GIF="gif")
    for i in range(DAMAGED_FILES):
        memory, kind = io.BytesIO(), random.choice(list(endings))
        Image.open(random.choice(sources)).convert("RGB").save(memory, kind)
        other = random.choice([e for e in endings.values() if e != endings[kind]])
        ending = other if i % 5 == 4 else endings[kind]
        (folder / f"{i:04}_{i % 5}.{ending}").write_bytes(damage(memory.getvalue(), i % 5))
    run = run_inference(folder)
    whole = sum(f"{path.as_posix()}\n" in run.stdout for path in folder.glob("*_4.*"))
    lines = run.stdout.count("Predicted   :") + run.stderr.count("skipped: ")
    record("damaged", f"files of {DAMAGED_FILES:,} that are read or skipped", lines)
    record("damaged", f"whole files of {DAMAGED_FILES // 5} that are read", whole)


def robust():
    """Empty paper, and tests/foreign changed in ways that leave the text readable."""
    chance, paper = np.random.default_rng(0), []
    for _ in range(200):
        height, width = chance.integers(20, 80), chance.integers(20, 500)
        light = np.linspace(*chance.uniform(120, 255, 2), width)[None]
        light = light + np.linspace(0, chance.uniform(-40, 40), height)[:, None]
        noise = chance.normal(0, chance.choice([0, 2, 6, 15]), (height, width))
        paper.append((light + noise).clip(0, 255).astype(np.uint8))
    model = crnn.load_checkpoint(WEIGHTS)
    empty = sum(not reading.text for reading in inference_crnn.recognize(paper, model))
    record("robust", "images of empty paper read as nothing, of 200", empty)
    for i, image in enumerate(map(Image.fromarray, paper)):
        (w, h), inset = image.size, int(chance.integers(0, 1 + min(image.size) // 8))
        corners, line = (
            (inset, inset, w - 1 - inset, h - 1 - inset),
            dict(fill=0, width=1 + h // 40),
        )
        if i % 2:
            ImageDraw.Draw(image).rectangle(corners, None, 0, line["width"])
        for y in range(h - 1 - inset, 0, -h // 2) if not i % 2 else ():
            ImageDraw.Draw(image).line((0, y, w, y), **line)
        paper[i] = image
    empty = sum(not reading.text for reading in inference_crnn.recognize(paper, model))
    record("robust", "empty boxes and ruled lines read as nothing, of 200", empty)
    rows = crnn.read_labels(FOREIGN / "labels.csv")
    images = [Image.open(FOREIGN / path).convert("L") for path in rows.image_path]

    def lit(image):
        falling = np.linspace(1, 0.4, image.width)[None]
        return (np.asarray(image, dtype=np.float32) * falling).astype(np.uint8)

    def framed(image):
        return ImageOps.expand(image, image.height // 2, fill=int(np.median(image)))

    changes = {"as they are": lambda image: image, "light on dark": ImageOps.invert}
    changes |= {"in falling light": lit, "with margins of half the height": framed}
    changes |= {"a quarter of the size": lambda image: image.reduce(4)}
    changes |= {"20 times the size": lambda image: image.resize([20 * s for s in image.size])}
    for name, change in changes.items():
        read = inference_crnn.recognize([change(image) for image in images], model)
        exact = np.mean([reading.text == label for reading, label in zip(read, rows.label)])
        record("robust", f"tests/foreign {name}, exact in percent", 100 * float(exact))


def memory():
    """The peak memory of reading ten thousand and a hundred thousand images of a csv."""
    rows, folder = crnn.read_labels(FOREIGN / "labels.csv"), fresh("memory")
    rows["image_path"] = [str(FOREIGN / path) for path in rows.image_path]
    for number in MEMORY_IMAGES:
        repeated = pd.concat([rows] * -(-number // len(rows))).head(number)
        crnn.write_labels(repeated, folder / f"{number}.csv")
        run = run_inference(folder / f"{number}.csv", timeout=3600)
        peak = float(run.stdout.split("peak ")[-1]) / 1e6
        record("memory", f"{number:,} images read, peak in GB", peak)


def picture():
    """.github/reads.png, what the shipped weights read in tests/foreign, and drawn.png, samples.

    Of fonts only: nothing of EMNIST or UNIPEN is in the repository.
    """
    rows = crnn.read_labels(FOREIGN / "labels.csv")
    rows = rows[rows.label.str.len() < 20].sample(20, random_state=0)
    paths, cells = [FOREIGN / path for path in rows.image_path], []
    for path, label, reading in zip(paths, rows.label, inference_crnn.recognize(paths, WEIGHTS)):
        colour = "#007020" if reading.text == label else "#c00000"
        cells.append((path, [(reading.text, colour)]))
    crnn.contact_sheet(ROOT / ".github" / "reads.png", cells, columns=4)
    sources = "trdg_custom", "handwriting", "synthetic_math"
    drawn = [(s, prepare_ocr_dataset.sample(s, i)) for i in range(60, 100, 3) for s in sources]
    cells = [
        (Image.fromarray(image), [(label, "black"), (f"{source}, {style}", "#777777")])
        for source, (image, label, _, style) in drawn
        if len(label) < 20 and style != "plain"
    ]
    crnn.contact_sheet(ROOT / ".github" / "drawn.png", cells[:16], columns=4)


def main(*wanted):
    """Run the parts of these names, or all."""
    parts = drawing, speed, kills, own, reading, peers, damaged, robust, memory, picture
    parts = {part.__name__: part for part in parts}
    if not set(wanted) <= set(parts):
        raise crnn.InputError(f"choose parts among {' '.join(parts)}")
    for name in wanted or parts:
        parts[name]()


if __name__ == "__main__":
    crnn.run(main, *sys.argv[1:])
