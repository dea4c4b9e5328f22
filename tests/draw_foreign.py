"""Make images of short text by other programs than ours: a browser, a typesetter, ImageMagick.

    python tests/draw_foreign.py [FOLDER [SEED [NUMBER]]]

Writes images and labels.csv (image_path,label,source,split) into FOLDER; tests/foreign was made
with the defaults. None of the fonts and of the texts are those of prepare_ocr_dataset.py. Needs the
Debian packages chromium groff poppler-utils imagemagick fonts-urw-base35 fonts-cmu fonts-ocr-a
fonts-humor-sans fonts-dkg-handwriting fonts-breip fonts-rufscript fonts-ecolier-court fonts-hack
fonts-linuxlibertine fonts-cantarell fonts-vollkorn fonts-fantasque-sans.
"""

import csv
import html
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from random import choice, randint

from PIL import Image, ImageChops

# --------------------------------------------------------------------------------------------------
FOLDER, SEED, NUMBER = Path(__file__).parent / "foreign", 0, 120  # where, which, how many images
CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --disable-sync --no-first-run"
    " --disable-background-networking --disable-component-update"
)
SANS = "Nimbus Sans,URW Gothic,Cantarell,CMU Sans Serif,Nimbus Sans Narrow,CMU Bright".split(",")
SERIF = "P052,C059,URW Bookman,CMU Serif,Linux Libertine O,Vollkorn".split(",")
MONO = "Nimbus Mono PS,CMU Typewriter Text,Hack,Fantasque Sans Mono,OCRA".split(",")
HAND = "Humor Sans,DkgHandwriting,Breip,Rufscript,Ecolier_court".split(",")
ONLY_CAPITALS = "Humor Sans"  # draws them for small letters too, so that its labels have no others
WEAR = {  # ImageMagick's arguments
    "none": "",
    "print and scan": "-attenuate 0.25 +noise Gaussian -blur 0x0.6 -rotate {tilt} -level 6%,92%",
    "fax": "-resize 60% -threshold 62% -resize 160%",
    "photo": "-rotate {tilt} -motion-blur 0x1.5+{angle} +level 12%,80% -quality 45",
    "low resolution": "-resize 38% -resize 260% -quality 55",
    "faint": "+level 45%,95% -attenuate 0.2 +noise Gaussian",
}
STEP, PAGE = 120, 100  # pixels from card to card of a web page, cards on one screenshot
# --------------------------------------------------------------------------------------------------

FIRST = (
    "Anna Bruno Chloe Dmitri Elif Farid Greta Hugo Ines Jonas Keiko Lars Mira Nils Olga Pavel "
    "Quinn Rosa Sven Tara Umar Vera Wim Xenia Yusuf Zoe"
).split()
LAST = (
    "Abbott Becker Castillo Dubois Eriksen Fischer Grant Hoffman Ivanov Jensen Kowalski Lindgren "
    "Murphy Novak Okafor Petrov Quigley Rossi"
).split()
THINGS = (
    "Milk Bread Butter Coffee Sugar Flour Paper Toner Screws Cable Hammer Ticket Parking Shipping "
    "Discount Subtotal Total Deposit Refund Invoice Receipt Quantity Balance Change Room Table "
    "Gate Seat Platform Locker Drawer Shelf Batch Model Serial Patient Ward"
).split()


def pick(*options):
    return choice(options)


def price():
    return f"{pick('', '', '$')}{randint(0, 299)}.{randint(0, 99):02}"


def date():
    day, month, year = randint(1, 28), randint(1, 12), randint(1970, 2029)
    day, month, short = f"{day:02}", f"{month:02}", f"{year % 100:02}"
    return pick(f"{day}/{month}/{year}", f"{year}-{month}-{day}", f"{day}.{month}.{short}")


def code():
    letters = "".join(random.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=randint(1, 3)))
    options = [f"{letters}-{randint(2, 9999)}", f"{letters}{randint(22, 99)}{choice('KMRTX')}"]
    options += [f"{randint(100, 999)} {randint(100, 999)} {randint(10, 99)}"]
    return choice([*options, f"#{randint(2000, 99999)}"])


def person():
    return pick(
        f"{choice(FIRST)} {choice(LAST)}", choice(LAST), f"{choice(FIRST)[0]}. {choice(LAST)}"
    )


def thing():
    word = choice(THINGS)
    counted = f"{word}: {randint(1, 40)}", f"{randint(2, 12)} x {word}", f"{word} ({price()})"
    return pick(word, word.upper(), word.lower(), *counted)


def single():
    return choice("ABDEFGHKLMNPQRTXYabdefghkmnpqrtuy23456789?&%#@=+")


def expression():
    a, b, c = (randint(2, 99) for _ in range(3))
    options = [f"{a}+{b}={a + b}", f"{a} - {b} = {a - b}", f"{a}×{b}={a * b}", f"{a * b}÷{b}={a}"]
    options += [f"{a}x+{b}={c}", f"y={a}x-{b}", f"({a}+{b})×{c}", f"{a}.{b}>{c}", f"{a}/{b}"]
    return choice([*options, f"x^2+{a}x={b}", f"{a}≤{b + a}", f"√{a * a}={a}"])


def card(text, group):
    """A text as a web page shows it, in the look of a group."""
    fonts = {"receipt": MONO, "hand": HAND, "label": SANS, "math": SERIF + SANS}
    family, size = choice(fonts.get(group, SANS + SERIF + MONO)), randint(22, 44)
    style = f"font-family:'{family}';font-size:{size}px;font-weight:{pick(400, 400, 700)};"
    if group not in ("receipt", "hand"):
        style += f"font-style:{pick('normal', 'normal', 'italic')};"
        style += f"letter-spacing:{pick(0, 0, 0, 1, 3)}px;"
    if group == "form":
        sides = "border:1px solid #555", "border-bottom:2px solid #333"
        style += pick(*sides, "border-bottom:1px dotted #000", "border:2px solid #000")
        style += ";padding:2px 9px;"
    if group == "label":
        dark = f"rgb({randint(0, 90)},{randint(0, 70)},{randint(0, 120)})"
        light = f"rgb({randint(200, 255)},{randint(190, 255)},{randint(150, 255)})"
        ink, paper = pick((dark, light), (light, dark))
        style += f"color:{ink};background:{paper};padding:4px 14px;border-radius:{pick(0, 6)}px;"
    if group == "hand" and random.random() < 0.5:
        style += "background:repeating-linear-gradient(#fff 0 15px,#9ab 15px 16px);padding:3px 8px;"
    style = f"white-space:pre;display:inline-block;line-height:1.35;{style}"
    return f'<span style="{style}">{html.escape(text)}</span>'


def crop(image, group):
    """What a person would cut out: the ink with some room, a coloured ground without the page."""
    white = Image.new("L", image.size, 255)
    difference = ImageChops.difference(image.convert("L"), white)
    box = difference.point(lambda tone: 255 * (tone > 12)).getbbox()
    m = 0 if group == "label" else randint(3, 9)
    return image.crop((box[0] - m, box[1] - m, box[2] + m, box[3] + m))


def browser(samples, folder):
    """Images of samples, (text, group), as Chromium shows them, with what they show."""
    cards = [card(text, group) for text, group in samples]
    images = []
    for start in range(0, len(cards), PAGE):
        page = "<meta charset=utf-8><body style='margin:0;background:#fff'>"
        for i, each in enumerate(cards[start : start + PAGE]):
            page += f"<div style='position:absolute;left:20px;top:{i * STEP + 24}px'>{each}</div>"
        (folder / "page.html").write_text(page, encoding="utf-8")
        options = [f"--user-data-dir={folder}/profile", f"--window-size=1400,{STEP * PAGE + 200}"]
        options += [f"--screenshot={folder}/page.png", f"file://{folder}/page.html"]
        subprocess.run([*CHROMIUM.split(), *options], check=True, capture_output=True)
        screen = Image.open(folder / "page.png").convert("RGB")
        for i, each in enumerate(cards[start : start + PAGE]):
            text, group = samples[start + i]
            image = crop(screen.crop((0, i * STEP, 1400, (i + 1) * STEP)), group)
            images.append((image, text.upper() if ONLY_CAPITALS in each else text))
    return images


def typesetter(samples, folder):
    """The same, as groff sets them in PDF and poppler rasterises it, one to a page."""
    signs = {"\\": "\\[rs]", "-": "\\-", "'": "\\[aq]", "^": "\\[ha]", "~": "\\[ti]"}
    source = ".pl 1.2i\n.po 0.3i\n.ll 7i\n.nh\n.nf\n"
    for i, (text, _) in enumerate(samples):
        escaped = text.translate(str.maketrans(signs))
        family = pick("T", "H", "P", "N", "C", "BM", "A")
        source += ".bp\n" * (i > 0) + f".sp 0.4i\n.fam {family}\n.ft {choice('RRBI')}\n"
        source += f".ps {randint(9, 16)}\n\\&{escaped}\n"
    command = ["groff", "-Kutf8", "-Tpdf", "-P-p1.2i,8i"]
    pdf = subprocess.run(command, input=source.encode(), check=True, capture_output=True).stdout
    (folder / "set.pdf").write_bytes(pdf)
    command = ["pdftoppm", "-r", "150", "-png", f"{folder}/set.pdf", f"{folder}/set"]
    subprocess.run(command, check=True)
    pages = sorted(folder.glob("set-*.png"))
    assert len(pages) == len(samples), (len(pages), len(samples))
    images = [crop(Image.open(page).convert("RGB"), "typeset") for page in pages]
    return [(image, text) for image, (text, _) in zip(images, samples)]


def worn(image, group, name, folder):
    """Save an image as ImageMagick wears it. Returns the name of its file in folder."""
    fax = ["fax"] * (image.height > 40 and group not in ("label", "hand"))
    wear = choice(["none", "print and scan", "photo", "low resolution", "faint", *fax])
    tilt, angle = round(random.uniform(-1.5, 1.5), 2), randint(0, 180)
    arguments = WEAR[wear].format(tilt=tilt, angle=angle).split()
    name += ".jpg" if "-quality" in arguments else ".png"
    ground = "#{:02x}{:02x}{:02x}".format(*image.getpixel((1, 1)))
    end = ["-strip"] if name.endswith("jpg") else ["-strip", "-colors", "32"]
    with tempfile.NamedTemporaryFile(suffix=".png") as clean:
        image.save(clean.name)
        command = ["convert", clean.name, "-background", ground, *arguments, *end]
        subprocess.run([*command, str(folder / name)], check=True)
    return name


def main(folder=FOLDER, seed=SEED, number=NUMBER):
    """Draw samples of all groups in turn, and write labels.csv."""
    random.seed(int(seed))
    texts = {
        "form": [person, date, code, single],
        "receipt": [thing, price, date],
        "label": [code, thing, person],
        "screen": [thing, person, code, price],
        "hand": [person, thing, date, price],
        "math": [expression],
        "single": [single],
        "typeset": [person, thing, code, price],
    }
    groups = [list(texts)[i % len(texts)] for i in range(int(number))]
    samples = [(choice(texts[group])(), group) for group in groups]
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = [("image_path", "label", "source", "split")]
    with tempfile.TemporaryDirectory() as temporary:
        set_in_type = [sample for sample in samples if sample[1] == "typeset"]
        others = [sample for sample in samples if sample[1] != "typeset"]
        by_browser = iter(browser(others, Path(temporary)))
        by_typesetter = iter(typesetter(set_in_type, Path(temporary)))
    for i, group in enumerate(groups):
        image, text = next(by_typesetter if group == "typeset" else by_browser)
        rows.append((worn(image, group, f"{i:04}", Path(folder)), text, group, "test"))
    with open(Path(folder) / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    print(f"{len(samples)} images in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
