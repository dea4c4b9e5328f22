"""Measure what the README claims. By hand, on an idle machine; about two and a half hours for all parts on 2 cores.

    python tests/benchmark.py                      all parts, then one table
    python tests/benchmark.py reading peers        some of them: drawing styles speed target race recipe scaling processes own
                                                   reading peers starting damaged robust memory

The pictures are drawn by prepare_ocr_dataset.py, once, into FOLDER; those of the parts reading, peers and styles by its default
constants, and they must be there. Every part trains from nothing but "own", which starts from OWN_START. The other recognisers
are called by peers.py. Wall time, one run a figure unless the table says otherwise.
"""
import io
import itertools
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import crnn
import inference_crnn
import peers as others
import prepare_ocr_dataset
import train_crnn

# ---------------------------------------------------------------------------------------------------------------------
FOLDER = ROOT / "datasets" / "benchmark"  # pictures, csv files and models of the benchmark
NUM_TRDG, NUM_MATH = 120_000, 48_000  # pictures drawn for it, all plain
TARGET_ROWS, TARGET_EPOCHS = 126_000, 4  # training rows of the part "target"
RACE_SECONDS = 180  # of wall time that each network of the part "race" is trained for
RECIPE_SECONDS = 300  # of processor time for each variant of the part "recipe"
SCALING_ROWS = 12_000  # of the part "scaling", and twice and four times as many
PROCESSES_ROWS = 30_000  # of the part "processes", two epochs of them
DRAWING_NUMBER = 40_000  # pictures of the part "drawing"
STYLES_BATCHES = 1_800  # for each variant of the part "styles", on the pictures of DEFAULT_CSV
DEFAULT_CSV = ROOT / "datasets" / "data.csv"  # of python prepare_ocr_dataset.py
FOREIGN = FOLDER / "foreign"  # by python tests/draw_foreign.py datasets/benchmark/foreign 1 800: what the part "styles" measures on
FOREIGN_TEST = ROOT / "tests" / "foreign"  # the test set among the pictures by other programs, of the parts from "peers" on
OWN_START = ROOT / "ocr_crnn_model" / "pretrained.pth"  # the weights that the part "own" starts from
REPEATS = 5  # of each timing of the parts "speed", "reading" and "starting"
READING_WORDS = 480  # printed words of about 100 pixels, of the part "reading"
PEERS_ROWS = 2_000  # test rows of each source of DEFAULT_CSV, of the part "peers": by default all
DAMAGED_FILES = 2_000  # of the part "damaged"
MEMORY_PICTURES = 10_000, 100_000  # of the part "memory"
# ---------------------------------------------------------------------------------------------------------------------


class ShiCRNN(nn.Module):
    """The network of Shi, Bai and Yao 2015 (arXiv:1507.05717, table 1): seven convolutions, two bidirectional LSTMs of 256."""

    def __init__(self, num_classes):
        super().__init__()
        def block(i, o, kernel, padding, norm):
            return [nn.Conv2d(i, o, kernel, 1, padding)] + [nn.BatchNorm2d(o)] * norm + [nn.ReLU()]
        self.cnn = nn.Sequential(
            *block(1, 64, 3, 1, False), nn.MaxPool2d(2), *block(64, 128, 3, 1, False), nn.MaxPool2d(2),
            *block(128, 256, 3, 1, False), *block(256, 256, 3, 1, False), nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            *block(256, 512, 3, 1, True), *block(512, 512, 3, 1, True), nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            *block(512, 512, 2, 0, False))
        self.lstm1, self.between = nn.LSTM(512, 256, bidirectional=True), nn.Linear(512, 256)
        self.lstm2, self.linear = nn.LSTM(256, 256, bidirectional=True), nn.Linear(512, num_classes)

    def forward(self, ink, widths):
        """Ink (N, 1, 32, W) to logits (T, N, C), and frames (N,); T is W / 4 + 1."""
        x = self.cnn(ink).squeeze(2).permute(2, 0, 1)  # (N, 512, 1, T) -> (T, N, 512)
        x = self.between(self.lstm1(x)[0])  # (T, N, 256)
        logits = self.linear(self.lstm2(x)[0])  # (T, N, C)
        return logits, torch.full((len(widths),), len(logits))


class OneHead(nn.Module):
    """The reference in the place of WithShortcut."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ink, widths):
        logits, frames = self.net(ink, widths)
        return (logits[:crnn.num_frames(ink.shape[3])],)


def count_weights(module):
    return sum(p.numel() for p in module.parameters())


def contenders(num_classes):
    """Name -> a network and its optimizers: ours with its shortcut head, and the reference with AdamW and a learning rate of 1e-3."""
    torch.manual_seed(0)
    ours, reference = train_crnn.WithShortcut(crnn.CRNN(num_classes), train_crnn.head_weights()[1]), OneHead(ShiCRNN(num_classes))
    return {"ours": (ours, train_crnn.make_optimizers(ours, 10)[0]),
            "Shi et al.": (reference, [torch.optim.AdamW(reference.parameters(), 1e-3, fused=True)])}


def step(net, optimizers, ink, targets, lengths):
    """One training step in the precision that train_crnn.py would choose, as its train_epoch does it."""
    widths = torch.full((len(ink),), ink.shape[3])
    dtype = crnn.arithmetic("cpu", train_crnn.PRECISION)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        heads = net(train_crnn.augment(ink, train_crnn.AUGMENT), widths)  # (T, N, C) each
    losses = [train_crnn.ctc_loss(logits, targets, crnn.num_frames(widths), lengths) for logits in heads]
    loss = sum(weight * loss for weight, loss in zip(train_crnn.head_weights(), losses))
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    for optimizer in optimizers:
        optimizer.step()


def speed():
    """Lines of 32 x 128 pixels a second in training, 64 at a time, augmentation included, in both precisions."""
    ink, lengths = torch.rand(64, 1, 32, 128), torch.full((64,), 10)
    targets, rows = torch.randint(1, 100, (64, 10)), []
    for precision in ("float32", None):
        train_crnn.PRECISION = precision
        for name, (net, optimizers) in contenders(104).items():
            step(net, optimizers, ink, targets, lengths)
            seconds = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                step(net, optimizers, ink, targets, lengths)
                seconds.append(time.perf_counter() - start)
            rows.append((f"speed, {str(crnn.arithmetic('cpu', train_crnn.PRECISION)).split('.')[1]}: {name}, {count_weights(net) / 1e6:.1f} M weights",
                         f"{64 / statistics.median(seconds):.0f} lines/s ({64 / max(seconds):.0f} to {64 / min(seconds):.0f})"))
    return rows


def train_by_clock(net, optimizers, buckets, seconds, clock):
    """Train for so many seconds, or other units, of a clock, with the one-cycle schedule of train_crnn.py by that clock. Returns the pictures seen."""
    torch.manual_seed(0)
    sizes, peaks, start, seen = train_crnn.common_sizes(buckets), [optimizer.defaults["lr"] for optimizer in optimizers], clock(), 0
    while True:
        for bucket, indices in train_crnn.shuffled_batches(buckets, sizes, train_crnn.BATCH_SIZE):
            part, warm = (clock() - start) / seconds, train_crnn.WARM_UP
            if part >= 1:
                return seen
            if isinstance(net, train_crnn.WithShortcut) and part > 1 - train_crnn.FROZEN_NORMS:
                net.crnn.norms.eval()
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = peak * (0.04 + 0.96 * part / warm if part < warm else
                                                          (1 + math.cos(math.pi * (part - warm) / (1 - warm))) / 2)
            step(net, optimizers, crnn.to_ink(bucket.pixels[indices]), bucket.targets[indices], bucket.lengths[indices])
            seen += len(indices)


def load_drawn():
    """Training buckets, some val rows and the charset of the drawn pictures."""
    train_crnn.DATA_CSV = str(drawn())
    rows, charset = train_crnn.read_rows("")
    buckets, scored = train_crnn.load_rows(rows, charset)
    return buckets, scored[scored.split == "val"].sample(3000, random_state=0), charset


def share_exact(rows, predictions):
    return f"{sum(a == b for a, b in zip(rows.label, predictions)) / len(rows):.2%} of {len(rows):,} val rows exact"


def race():
    """Both networks trained for RACE_SECONDS of wall time on the same pictures."""
    buckets, val, charset = load_drawn()
    rows = []
    for name, (net, optimizers) in contenders(charset.num_classes).items():
        seen = train_by_clock(net, optimizers, buckets, RACE_SECONDS, time.perf_counter)
        predictions = read_padded(net.crnn, charset, val) if name == "ours" else read_unpadded(net.net, charset, val)
        rows.append((f"race, {RACE_SECONDS} s each: {name}", f"{share_exact(val, predictions)}, {seen:,} pictures seen"))
    return rows


def recipe():
    """What each part of the recipe pays: RECIPE_SECONDS of processor time with it and without."""
    buckets, val, charset = load_drawn()
    variants = {"as it is": {}, "float32": dict(PRECISION="float32"), "AdamW for all weights": {},
                "without the shortcut head": dict(SHORTCUT_WEIGHT=0), "batches of 64": dict(BATCH_SIZE=64, MATRIX_LEARNING_RATE=1.4e-2),
                "half the learning rate of Muon": dict(MATRIX_LEARNING_RATE=5e-3)}
    defaults, rows = dict(vars(train_crnn)), []
    for name, changes in variants.items():
        vars(train_crnn).update(changes)
        net, optimizers = contenders(charset.num_classes)["ours"]
        if name.startswith("AdamW"):
            optimizers = [torch.optim.AdamW(net.parameters(), train_crnn.LEARNING_RATE, weight_decay=train_crnn.WEIGHT_DECAY, fused=True)]
        seen = train_by_clock(net, optimizers, buckets, RECIPE_SECONDS, time.process_time)
        rows.append((f"recipe, {RECIPE_SECONDS} processor-seconds: {name}",
                     f"{share_exact(val, read_padded(net.crnn, charset, val))}, {seen:,} pictures seen"))
        vars(train_crnn).update({key: defaults[key] for key in changes})
    return rows


def read_padded(model, charset, rows):
    """The texts that the network reads in the pictures of rows."""
    return list(train_crnn.read(model, charset, rows).prediction)


@torch.inference_mode()
def read_unpadded(model, charset, rows):
    """Read one by one: the reference knows no padding, and beside wider lines would read its own worse."""
    model.eval()
    readings = []
    for picture in rows.picture:
        logits, frames = model(*crnn.pad_batch([torch.from_numpy(picture)]))
        readings.append(crnn.greedy_decode(logits, frames, charset)[0].text)
    return readings


def drawn():
    """The csv of the printed text and expressions that the parts train on; drawn where it is not there yet."""
    csv = FOLDER / "data.csv"
    if not csv.exists():
        for name, value in dict(DATASETS_DIR=str(FOLDER), NUM_TRDG=NUM_TRDG, NUM_MATH=NUM_MATH, STYLED=0, NUM_EMNIST=0,
                                NUM_EMNIST_WORDS=0, NUM_EMNIST_MATH=0, NUM_HANDWRITING=0).items():
            setattr(prepare_ocr_dataset, name, value)
        prepare_ocr_dataset.main()
    return csv


def first_rows(number, val=None):
    """A csv of a part of the drawn training rows, with a tenth as many val rows, or val of them."""
    rows = crnn.read_labels(drawn()).sample(frac=1, random_state=0)
    path = FOLDER / f"data.{number}.csv"
    crnn.write_labels(pd.concat([rows[rows.split == "train"].head(number), rows[rows.split == "val"].head(val or number // 10)]), path)
    return path


def train(name, processes=1, **constants):
    """Train in a process of its own. Returns the last row of history.csv, minutes, and the peak memory in GB."""
    folder = FOLDER / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    constants = dict(dict(MIN_STEPS=0, INIT_WEIGHTS=None), MODEL_PATH=str(folder / "crnn.pth"), **constants)
    script = Path(tempfile.mkdtemp()) / "run.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_crnn\nvars(train_crnn).update({constants!r})\n"
                      "if __name__ == '__main__':\n    train_crnn.main()\n"
                      "    import resource\n    print('peak GB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    start = time.perf_counter()
    run = subprocess.run([sys.executable, *launcher, str(script)], stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    minutes = (time.perf_counter() - start) / 60
    (folder / "log.txt").write_text(run.stdout, encoding="utf-8")
    return pd.read_csv(folder / "history.csv").iloc[-1], minutes, float(run.stdout.split("peak GB")[1])


def target():
    last, minutes, memory = train("target", DATA_CSV=str(first_rows(TARGET_ROWS, val=1_000_000)), EPOCHS=TARGET_EPOCHS)
    exact = ", ".join(f"{s.removeprefix('exact ')} {last[s]:.2%}" for s in last.index if s.startswith("exact"))
    history = pd.read_csv(FOLDER / "models" / "target" / "history.csv")
    on_the_way = ", ".join(f"{row['exact all']:.2%} after {minutes - (last.seconds - row.seconds) / 60:.1f} min" for _, row in history.iloc[:-1].iterrows())
    return [(f"target, from nothing, {TARGET_EPOCHS} epochs of {TARGET_ROWS:,} rows",
             f"val rows exact: {exact}; {minutes:.1f} min in all (on the way: {on_the_way}), {memory:.1f} GB at most")]


def scaling():
    rows = []
    for factor in (1, 2, 4):
        csv = first_rows(SCALING_ROWS * factor)
        last, _, memory = train(f"scaling{factor}", DATA_CSV=str(csv), EPOCHS=1)
        number = SCALING_ROWS * factor
        rows.append((f"scaling, {number:,} training rows", f"{number / last.images_per_second:.0f} s an epoch, {memory:.2f} GB at most"))
    return rows


def processes():
    csv, rows = first_rows(PROCESSES_ROWS), []
    for number in (1, 2):
        last, minutes, memory = train(f"processes{number}", processes=number, DATA_CSV=str(csv), EPOCHS=2)
        rows.append((f"processes: {number}, two epochs of {PROCESSES_ROWS:,} rows",
                     f"{last['exact all']:.2%} of the val rows exact, {minutes:.1f} min, {memory:.1f} GB at most in one process"))
    return rows


def drawing():
    """Printed text by prepare_ocr_dataset.py and by TRDG's own command line: the same texts and fonts, as many processes, whole commands timed."""
    folder = FOLDER / "drawing"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "fonts").mkdir(parents=True)
    ours = ("import sys; sys.path.insert(0, {root!r}); import prepare_ocr_dataset as p\nvars(p).update(dict.fromkeys([n for n in vars(p) if "
            "n.startswith('NUM_') and n != 'NUM_WORKERS'], 0), NUM_TRDG={number}, STYLED=0, DATASETS_DIR={out!r})\n"
            "if __name__ == '__main__': p.main()").format(root=str(ROOT), number=DRAWING_NUMBER, out=str(folder / "ours"))
    (folder / "run.py").write_text(ours)
    start = time.perf_counter()
    subprocess.run([sys.executable, str(folder / "run.py")], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds = {"ours": time.perf_counter() - start}
    rows = crnn.read_labels(folder / "ours" / "data.csv")
    (folder / "texts.txt").write_text("\n".join(rows.label), encoding="utf-8")
    for font in prepare_ocr_dataset.find_fonts()[0]:
        if font.kind == prepare_ocr_dataset.PRINTED and not font.held_out:
            shutil.copy(font.path, folder / "fonts" / f"{Path(font.path).stem}.ttf")  # the only suffix it looks for
    # Its settings nearest to ours: heights about 38 pixels, noise behind the text, some blur and skew. Pillow 10 removed getsize.
    options = ["trdg", "-i", str(folder / "texts.txt"), "-c", str(DRAWING_NUMBER), "-fd", str(folder / "fonts"), "-f", "38", "-b", "0", "-bl", "1", "-rbl",
               "-k", "3", "-rk", "-e", "png", "-t", str(prepare_ocr_dataset.NUM_WORKERS), "--output_dir", str(folder / "trdg"), "-na", "2"]
    shim = ("import sys; from PIL import ImageFont; ImageFont.FreeTypeFont.getsize = lambda self, text: self.getbbox(text)[2:]; "
            f"sys.argv = {options!r}; from trdg.run import main; main()")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", shim], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds["TRDG's command line"] = time.perf_counter() - start
    drawn_by_trdg = len(list((folder / "trdg").glob("*.png")))
    return [(f"drawing {DRAWING_NUMBER:,} printed lines: {name}", f"{number / seconds[name]:.0f} img/s, {seconds[name]:.0f} s in all")
            for name, number in (("ours", len(rows)), ("TRDG's command line", drawn_by_trdg))]


def merged(parts):
    """Training buckets of several calls of load_rows as one dict."""
    together = {}
    for width in sorted(set().union(*parts)):
        same = [part[width] for part in parts if width in part]
        bucket = together[width] = train_crnn.Bucket(width, False)
        longest = max(b.targets.shape[1] for b in same)
        bucket.pixels, bucket.lengths = torch.cat([b.pixels for b in same]), torch.cat([b.lengths for b in same])
        bucket.targets = torch.cat([nn.functional.pad(b.targets, (0, longest - b.targets.shape[1]), value=crnn.BLANK) for b in same])
    return together


def styles():
    """Trained for the same number of batches on all pictures, on the plain ones, and without each style in turn: val rows and foreign pictures."""
    train_crnn.DATA_CSV = str(DEFAULT_CSV)
    rows, charset = train_crnn.read_rows("")
    parts, scored = {}, []
    for style, group in rows.groupby("style"):
        parts[style], val = train_crnn.load_rows(group, charset)
        scored.append(val[val.split == "val"])
    foreign = crnn.read_labels(FOREIGN / "labels.csv")
    pictures = [crnn.load_image(FOREIGN / path).numpy() for path in foreign.image_path]
    scored = pd.concat([*scored, foreign.assign(source="foreign", picture=pictures)])
    results = []
    for left_out in ("nothing", "all styles", *sorted(set(parts) - {"plain", "custom"})):
        kept = [part for style, part in parts.items() if style == "plain" or left_out not in (style, "all styles")]
        net, optimizers = contenders(charset.num_classes)["ours"]
        seen = train_by_clock(net, optimizers, merged(kept), STYLES_BATCHES, itertools.count().__next__)
        table = crnn.score_table(list(scored.label), read_padded(net.crnn, charset, scored), list(scored.source))
        results.append((f"styles, {STYLES_BATCHES:,} batches, without {left_out}",
                        ", ".join(f"{s} {table.exact[s]:.1%} / {table.CER[s]:.1%}" for s in table.index if s != "all") + f"; {seen:,} seen"))
        print(*results[-1], flush=True)
    return results


def draw_code(index, fonts):
    """A five-character code over a noisy background, 200 x 50 pixels, as many websites draw them; no 0, O, 1 or I."""
    random.seed(index)
    code = "".join(random.choices("23456789ABCDEFGHJKLMNPQRSTUVWXYZ", k=5))
    paper = [random.randint(170, 255) for _ in range(3)]
    image = Image.effect_noise((200, 50), random.randint(20, 60)).convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, tuple(paper)), 0.6)
    draw = ImageDraw.Draw(image)
    for i, c in enumerate(code):
        ink = tuple(random.randint(0, 110) for _ in range(3))
        glyph = Image.new("L", (60, 60))
        ImageDraw.Draw(glyph).text((30, 30), c, font=ImageFont.truetype(random.choice(fonts), random.randint(28, 38)), fill=255, anchor="mm")
        glyph = glyph.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC)
        image.paste(ink, (6 + i * 36 + random.randint(-5, 5), random.randint(-9, 0)), glyph)
    for _ in range(random.randint(2, 5)):
        draw.line([(random.randint(0, 200), random.randint(0, 50)) for _ in range(2)], fill=tuple(random.randint(0, 150) for _ in range(3)), width=1)
    for _ in range(150):
        draw.point((random.randint(0, 199), random.randint(0, 49)), fill=tuple(random.randint(0, 200) for _ in range(3)))
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.7))), code


def own():
    """Such codes in a csv with image_path, label and split, 1,000 or 200 of them to train and validate on, 800 others to test; nothing tuned."""
    folder = FOLDER / "own"
    folder.mkdir(parents=True, exist_ok=True)
    fonts = sorted(str(p) for p in (ROOT / "myFonts" / "printed").glob("*-700.woff2"))
    rows, results = [], []
    for i in range(1800):
        image, code = draw_code(i, fonts)
        image.save(folder / f"{i:04}.png")
        rows.append((f"{i:04}.png", code, "test" if i < 800 else "val" if i % 10 == 0 else "train"))
    rows = pd.DataFrame(rows, columns=["image_path", "label", "split"])
    read = inference_crnn.recognize([folder / path for path in rows.image_path[:800]], str(OWN_START))
    results.append((f"own: {OWN_START.name} as it is", f"{sum(a == b.text for a, b in zip(rows.label, read)) / 8:.1f} % of 800 test rows exact"))
    for number in (200, 1000):
        crnn.write_labels(rows.head(800 + number), folder / "own.csv")
        for name, start in (("from nothing", None), (f"starting from {OWN_START.name}", str(OWN_START))):
            _, minutes, memory = train("own", DATA_CSV=str(folder / "own.csv"), INIT_WEIGHTS=start, MIN_STEPS=train_crnn.MIN_STEPS)
            table = (FOLDER / "models" / "own" / "log.txt").read_text(encoding="utf-8").split("Test rows")[1].splitlines()
            test = next(line for line in table if line.startswith("custom")).split()
            results.append((f"own: {number:,} codes, {name}", f"{test[2]} of {test[1]} test rows exact, {minutes:.1f} min"))
            print(*results[-1], flush=True)
    return results


def run_reader(name, csv, core=0, tall=False, passes=1):
    """Start a recogniser on a csv, on one core. Returns the process, and where its readings will be."""
    out = FOLDER / "peers" / f"{Path(csv).stem}.{name.replace(' ', '_')}{'.tall' * tall}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PEERS_CORE=str(core), PEERS_TALL="1" if tall else "")
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "peers.py"), name, str(csv), str(out), str(passes)], env=environment, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"), out


def finished(name, process):
    """The last line that a recogniser printed: lines a second, or why it is missing."""
    output, errors = process.communicate()
    if process.returncode not in (0, 3):
        raise SystemExit(f"{name} failed:\n{errors[-2000:]}")
    return output.strip().splitlines()[-1]


def reading():
    """Lines a second on one thread, from a grey picture in memory to its text: single printed words, brought to height 32, 80 to 120 pixels wide."""
    rows, words = crnn.add_split(crnn.read_labels(DEFAULT_CSV)), []
    folder = FOLDER / "words"
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows[(rows.split != "train") & (rows.source == "trdg_custom") & (rows["style"] == "plain") & ~rows.label.str.contains(" ")].itertuples():
        with Image.open(DEFAULT_CSV.parent / row.image_path) as image:
            picture = crnn.at_height(image.convert("L"), crnn.HEIGHT)
        if 80 <= picture.shape[1] <= 120 and len(words) < READING_WORDS:
            Image.fromarray(picture).save(folder / Path(row.image_path).name)
            words.append((Path(row.image_path).name, row.label, "words"))
    crnn.write_labels(pd.DataFrame(words, columns=["image_path", "label", "source"]), folder / "words.csv")
    rates = {name: finished(name, run_reader(name, folder / "words.csv", passes=REPEATS)[0]) for name in others.READERS}
    def result(name):
        rate = rates[name]
        return rate if rate.startswith("not") else f"{float(rate):.0f} lines/s" + (f", ours is {float(rates['ours']) / float(rate):.1f} times as fast" if name != "ours" else "")
    return [(f"reading {len(words)} words, one thread: {name}", result(name)) for name in others.READERS]


def peers():
    """Lines read without an error by ours and by other recognisers, on the same test rows and on tests/foreign; of two preparations the better one."""
    rows = crnn.add_split(crnn.read_labels(DEFAULT_CSV))
    chosen = rows[rows.split == "test"].sample(frac=1, random_state=0).groupby("source").head(PEERS_ROWS)
    foreign = crnn.read_labels(FOREIGN_TEST / "labels.csv")
    foreign["image_path"] = [os.path.relpath(FOREIGN_TEST / path, DEFAULT_CSV.parent) for path in foreign.image_path]
    path, shown = DEFAULT_CSV.parent / ".peers.csv", pd.concat([chosen, foreign.assign(source="foreign: " + foreign.source)])
    plain = (shown["style"] == "plain").to_numpy()  # in the order of the readings
    crnn.write_labels(shown[["image_path", "label", "source"]], path)
    results = []
    for name in others.READERS:
        running = [run_reader(name, path, core, tall) for core, tall in enumerate((False, True))]
        lines = [finished(name, process) for process, _ in running]
        if lines[0].startswith("not"):
            results.append((f"peers: {name}", lines[0]))
            continue
        tables, on_plain = [], []
        for _, out in running:
            readings = pd.read_csv(out, dtype=str, keep_default_na=False)
            tables.append(crnn.score_table(list(readings.label), list(readings.prediction), list(readings.source)))
            on_plain.append(share_without_error(readings[plain]))
        best = {s: max(((t.exact[s], -t.CER[s]) for t in tables)) for s in tables[0].index if s != "all"}
        results.append((f"peers: {name}", ", ".join(f"{s} {exact:.1%} / {-cer:.1%}" for s, (exact, cer) in best.items())))
        results.append((f"peers, plain rows only: {name}", ", ".join(
            "{} {:.1%} (look-alikes folded {:.1%}, and spaces left out {:.1%})".format(s, *max(both[s] for both in on_plain)) for s in on_plain[0])))
        print(*results[-2], *results[-1], sep="\n", flush=True)
    return results


def share_without_error(readings):
    """By source: the share of readings without an error, with look-alikes counted as one, and then with spaces left out."""
    folded = [readings[column].map(crnn.fold_lookalikes) for column in ("label", "prediction")]
    right = pd.DataFrame(dict(source=readings.source, exact=readings.label == readings.prediction, folded=folded[0] == folded[1],
                              unspaced=folded[0].str.replace(" ", "") == folded[1].str.replace(" ", "")))
    return {s: (group.exact.mean(), group.folded.mean(), group.unspaced.mean()) for s, group in right.groupby("source")}


def starting():
    """From the start of python inference_crnn.py PICTURE to its end, against import torch alone; turn by turn, median."""
    picture = next(FOREIGN_TEST.glob("*.png"))
    commands = {"python -c 'import torch'": ["-c", "import torch"], "python inference_crnn.py one.png": [str(ROOT / "inference_crnn.py"), str(picture)]}
    seconds = {name: [] for name in commands}
    for _ in range(REPEATS + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            seconds[name].append(time.perf_counter() - start)
    return [(f"starting: {name}", f"{statistics.median(times[1:]):.2f} s ({min(times[1:]):.2f} to {max(times[1:]):.2f})") for name, times in seconds.items()]


def run_inference(path, timeout=600):
    """inference_crnn.py on a path in a process of its own, its output files in FOLDER. Returns the process, with its peak memory as the last word."""
    script = (f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); sys.stdout.reconfigure(encoding='utf-8'); import inference_crnn as i\n"
              f"i.MODEL_PATH, i.PRETRAINED, i.REPORT_DIR = {str(ROOT / inference_crnn.MODEL_PATH)!r}, {str(ROOT / inference_crnn.PRETRAINED)!r}, None\n"
              f"status = i.main([{str(path)!r}]); print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)")
    return subprocess.run([sys.executable, "-c", script], cwd=FOLDER, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          encoding="utf-8", env=dict(os.environ, PYTHONIOENCODING="utf-8"))


def damage(data, kind):
    """The bytes of a picture file, cut off, with flipped bits, with a hostile header, or made of nothing but noise; kind 4 leaves them as they are."""
    data = bytearray(data)
    if kind == 0:
        return data[:random.randint(0, len(data))]
    if kind == 1:
        for _ in range(random.randint(1, 30)):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    if kind == 2:
        for i in range(4, min(40, len(data))):
            if random.random() < 0.3:
                data[i] = random.choice([0, 255, random.randrange(256)])
    return random.randbytes(random.randint(0, 3000)) if kind == 3 else data


def damaged():
    """One run of inference_crnn.py over mutated picture files; a fifth of them are whole, under the name of another format."""
    random.seed(0)
    folder = FOLDER / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sources = sorted(FOREIGN_TEST.glob("*.png"))
    endings = dict(PNG="png", JPEG="jpg", WEBP="webp", TIFF="tif", BMP="bmp", GIF="gif")
    for i in range(DAMAGED_FILES):
        memory, format = io.BytesIO(), random.choice(list(endings))
        Image.open(random.choice(sources)).convert("RGB").save(memory, format)
        ending = random.choice([e for e in endings.values() if e != endings[format]]) if i % 5 == 4 else endings[format]
        (folder / f"{i:04}_{i % 5}.{ending}").write_bytes(damage(memory.getvalue(), i % 5))
    start = time.perf_counter()
    run = run_inference(folder)
    whole = sum(f"{path.as_posix()}\n" in run.stdout for path in folder.glob("*_4.*"))
    return [(f"damaged: {DAMAGED_FILES:,} files", f"{run.stdout.count('Predicted   :'):,} read, {run.stderr.count('skipped: '):,} skipped, {whole} of "
             f"{DAMAGED_FILES // 5} whole ones read, exit status {run.returncode}, {time.perf_counter() - start:.1f} s")]


def robust():
    """Empty paper, and tests/foreign as it is and changed in ways that leave the text readable; by the shipped weights or a model of one's own."""
    chance = np.random.default_rng(0)
    paper = []
    for _ in range(200):
        height, width = chance.integers(20, 80), chance.integers(20, 500)
        light = np.linspace(*chance.uniform(120, 255, 2), width)[None] + np.linspace(0, chance.uniform(-40, 40), height)[:, None]
        paper.append((light + chance.normal(0, chance.choice([0, 2, 6, 15]), (height, width))).clip(0, 255).astype(np.uint8))
    checkpoint = inference_crnn.load_checkpoint(str(ROOT / inference_crnn.model_path()))
    read = inference_crnn.recognize(paper, checkpoint)
    confidences = [reading.confidence for reading in read if not reading.text]
    results = [("robust: 200 pictures of empty paper", f"{len(confidences)} read as nothing, mean confidence {statistics.mean(confidences or [0]):.2f}")]
    rows = crnn.read_labels(FOREIGN_TEST / "labels.csv")
    pictures = [Image.open(FOREIGN_TEST / path).convert("L") for path in rows.image_path]

    def lit(image):
        ink = np.asarray(image, dtype=np.float32)
        return (ink * np.linspace(1, 0.4, image.width)[None]).astype(np.uint8)
    changes = {"as they are": lambda image: image, "light on dark": ImageOps.invert, "in light that falls to 40 % from left to right": lit,
               "a quarter of their height": lambda image: image.resize((max(1, image.width // 4), max(1, image.height // 4)), Image.Resampling.BOX),
               "20 times their height": lambda image: image.resize((image.width * 20, image.height * 20), Image.Resampling.BICUBIC),
               "with a paper margin of half their height": lambda image: ImageOps.expand(image, image.height // 2, fill=int(np.median(image)))}
    for name, change in changes.items():
        read = inference_crnn.recognize([change(picture) for picture in pictures], checkpoint)
        exact = sum(reading is not None and reading.text == label for reading, label in zip(read, rows.label))
        results.append((f"robust: tests/foreign, {name}", f"{exact / len(rows):.1%} of {len(rows)} exact"))
    return results


def memory():
    """The peak memory of reading ten thousand and a hundred thousand pictures of a csv."""
    rows, results = crnn.read_labels(FOREIGN_TEST / "labels.csv"), []
    for number in MEMORY_PICTURES:
        path = FOREIGN_TEST / f".{number}.csv"
        try:
            crnn.write_labels(pd.concat([rows] * -(-number // len(rows))).head(number), path)
            start = time.perf_counter()
            run = run_inference(path)
            results.append((f"memory: {number:,} pictures read", f"{float(run.stdout.split('peak ')[-1]) / 1e6:.2f} GB at most, {time.perf_counter() - start:.0f} s"))
        finally:
            path.unlink(missing_ok=True)
    return results


def main():
    parts = [drawing, styles, speed, target, race, recipe, scaling, processes, own, reading, peers, starting, damaged, robust, memory]
    wanted = sys.argv[1:] or [part.__name__ for part in parts]
    unknown = set(wanted) - {part.__name__ for part in parts}
    if unknown:
        raise SystemExit(f"no part {unknown.pop()!r}: choose among {' '.join(part.__name__ for part in parts)}")
    train_crnn.INIT_WEIGHTS = None  # or else the networks trained in this process would get the learning rates of a warm start
    table = []
    for part in parts:
        if part.__name__ in wanted:
            table += part()
            print(*table[-1], flush=True)  # a part takes minutes, and what is measured should not be lost
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, arithmetic {crnn.arithmetic('cpu', train_crnn.PRECISION)}")
    width = max(len(name) for name, _ in table)
    for name, result in table:
        print(f"{name:<{width}}  {result}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
