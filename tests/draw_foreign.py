"""Make pictures of short text by other programs than ours, to test on: a browser and a typesetter draw them, ImageMagick wears them out.

    apt-get install chromium groff poppler-utils imagemagick fonts-urw-base35 fonts-cmu fonts-ocr-a fonts-humor-sans fonts-dkg-handwriting \\
        fonts-breip fonts-rufscript fonts-ecolier-court fonts-hack fonts-linuxlibertine fonts-cantarell fonts-vollkorn fonts-fantasque-sans
    python tests/draw_foreign.py [FOLDER [SEED [NUMBER]]]

Writes pictures and labels.csv (image_path,label,source,split) into FOLDER; tests/foreign was made with the defaults. None of the fonts and
none of the texts are those of prepare_ocr_dataset.py; its words and random generators are not used.
"""
import csv
import html
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

# ---------------------------------------------------------------------------------------------------------------------
FOLDER, SEED, NUMBER = Path(__file__).parent / "foreign", 0, 120  # where, which, and how many pictures
CHROMIUM = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run"]
SANS = ["Nimbus Sans", "URW Gothic", "Cantarell", "CMU Sans Serif", "Nimbus Sans Narrow", "CMU Bright"]
SERIF = ["P052", "C059", "URW Bookman", "CMU Serif", "Linux Libertine O", "Vollkorn"]
MONO = ["Nimbus Mono PS", "CMU Typewriter Text", "Hack", "Fantasque Sans Mono", "OCRA"]
HAND = ["Humor Sans", "DkgHandwriting", "Breip", "Rufscript", "Ecolier_court"]
ONLY_CAPITALS = "Humor Sans"  # draws them for small letters too, so that its labels have no others
WEAR = {  # ImageMagick's arguments
    "none": "", "print and scan": "-attenuate 0.25 +noise Gaussian -blur 0x0.6 -rotate {tilt} -level 6%,92%",
    "fax": "-resize 60% -threshold 62% -resize 160%", "photo": "-rotate {tilt} -motion-blur 0x1.5+{angle} +level 12%,80% -quality 45",
    "low resolution": "-resize 38% -resize 260% -quality 55", "faint": "+level 45%,95% -attenuate 0.2 +noise Gaussian",
}
# ---------------------------------------------------------------------------------------------------------------------

FIRST = "Anna Bruno Chloe Dmitri Elif Farid Greta Hugo Ines Jonas Keiko Lars Mira Nils Olga Pavel Quinn Rosa Sven Tara Umar Vera Wim Xenia Yusuf Zoe".split()
LAST = "Abbott Becker Castillo Dubois Eriksen Fischer Grant Hoffman Ivanov Jensen Kowalski Lindgren Murphy Novak Okafor Petrov Quigley Rossi".split()
THINGS = ("Milk Bread Butter Coffee Sugar Flour Paper Toner Screws Cable Hammer Ticket Parking Shipping Discount Subtotal Total Deposit Refund "
          "Invoice Receipt Quantity Balance Change Room Table Gate Seat Platform Locker Drawer Shelf Batch Model Serial Patient Ward").split()


def price():
    return f"{random.choice(['', '', '$'])}{random.randint(0, 299)}.{random.randint(0, 99):02}"


def date():
    day, month, year = random.randint(1, 28), random.randint(1, 12), random.randint(1970, 2029)
    return random.choice([f"{day:02}/{month:02}/{year}", f"{year}-{month:02}-{day:02}", f"{day:02}.{month:02}.{year % 100:02}"])


def code():
    letters = "".join(random.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=random.randint(1, 3)))
    return random.choice([f"{letters}-{random.randint(2, 9999)}", f"{letters}{random.randint(22, 99)}{random.choice('KMRTX')}",
                          f"{random.randint(100, 999)} {random.randint(100, 999)} {random.randint(10, 99)}", f"#{random.randint(2000, 99999)}"])


def person():
    return random.choice([f"{random.choice(FIRST)} {random.choice(LAST)}", random.choice(LAST), f"{random.choice(FIRST)[0]}. {random.choice(LAST)}"])


def thing():
    word = random.choice(THINGS)
    return random.choice([word, word.upper(), word.lower(), f"{word}: {random.randint(1, 40)}", f"{random.randint(2, 12)} x {word}", f"{word} ({price()})"])


def single():
    return random.choice("ABDEFGHKLMNPQRTXYabdefghkmnpqrtuy23456789?&%#@=+")


def expression():
    a, b, c = (random.randint(2, 99) for _ in range(3))
    return random.choice([f"{a}+{b}={a + b}", f"{a} - {b} = {a - b}", f"{a}×{b}={a * b}", f"{a * b}÷{b}={a}", f"{a}x+{b}={c}", f"y={a}x-{b}",
                          f"({a}+{b})×{c}", f"{a}.{b}>{c}", f"{a}/{b}", f"x^2+{a}x={b}", f"{a}≤{b + a}", f"√{a * a}={a}"])


def card(text, group):
    """A text as a web page shows it, in the look of a group."""
    fonts = {"receipt": MONO, "hand": HAND, "label": SANS, "math": SERIF + SANS}.get(group, SANS + SERIF + MONO)
    style = f"font-family:'{random.choice(fonts)}';font-size:{random.randint(22, 44)}px;font-weight:{random.choice([400, 400, 700])};"
    if group not in ("receipt", "hand"):
        style += f"font-style:{random.choice(['normal', 'normal', 'italic'])};letter-spacing:{random.choice([0, 0, 0, 1, 3])}px;"
    if group == "form":
        style += random.choice(["border:1px solid #555;", "border-bottom:2px solid #333;", "border-bottom:1px dotted #000;", "border:2px solid #000;"]) + "padding:2px 9px;"
    if group == "label":
        dark, light = f"rgb({random.randint(0, 90)},{random.randint(0, 70)},{random.randint(0, 120)})", f"rgb({random.randint(200, 255)},{random.randint(190, 255)},{random.randint(150, 255)})"
        ink, paper = random.choice([(dark, light), (light, dark)])
        style += f"color:{ink};background:{paper};padding:4px 14px;border-radius:{random.choice([0, 6])}px;"
    if group == "hand" and random.random() < 0.5:
        style += "background:repeating-linear-gradient(#fff 0 15px,#9ab 15px 16px);padding:3px 8px;"
    return f"<div style='position:absolute;left:20px;top:TOPpx'><span style=\"white-space:pre;display:inline-block;line-height:1.35;{style}\">{html.escape(text)}</span></div>"


def crop(image, group):
    """What a person would cut out: the ink with some room around it, its coloured ground without the page's white."""
    box = ImageChops.difference(image.convert("L"), Image.new("L", image.size, 255)).point(lambda tone: 255 * (tone > 12)).getbbox()
    m = 0 if group == "label" else random.randint(3, 9)
    return image.crop((box[0] - m, box[1] - m, box[2] + m, box[3] + m))


def browser(samples, folder):
    """Pictures of samples, (text, group), as Chromium shows them, with what they show."""
    step = 120
    cards = [card(text, group).replace("TOP", str(i * step + 24)) for i, (text, group) in enumerate(samples)]
    pictures = []
    for start in range(0, len(cards), 100):  # a screenshot has a greatest height
        part = "".join(c.replace(f"top:{i * step + 24}px", f"top:{(i - start) * step + 24}px") for i, c in enumerate(cards[start:start + 100], start))
        (folder / "page.html").write_text(f"<meta charset=utf-8><body style='margin:0;background:#fff'>{part}", encoding="utf-8")
        subprocess.run([*CHROMIUM, f"--user-data-dir={folder}/profile", f"--window-size=1400,{step * 100 + 200}", f"--screenshot={folder}/page.png",
                        f"file://{folder}/page.html"], check=True, capture_output=True)
        page = Image.open(folder / "page.png").convert("RGB")
        pictures += [(crop(page.crop((0, (i - start) * step, 1400, (i - start + 1) * step)), samples[i][1]),
                      samples[i][0].upper() if ONLY_CAPITALS in cards[i] else samples[i][0]) for i in range(start, min(start + 100, len(cards)))]
    return pictures


def typesetter(samples, folder):
    """The same, as groff sets them in PDF and poppler rasterises it, one to a page."""
    source = ".pl 1.2i\n.po 0.3i\n.ll 7i\n.nh\n.nf\n"
    for i, (text, _) in enumerate(samples):
        escaped = text.replace("\\", "\\[rs]").replace("-", "\\-").replace("'", "\\[aq]").replace("^", "\\[ha]").replace("~", "\\[ti]")
        source += ".bp\n" * (i > 0) + f".sp 0.4i\n.fam {random.choice(['T', 'H', 'P', 'N', 'C', 'BM', 'A'])}\n.ft {random.choice('RRBI')}\n.ps {random.randint(9, 16)}\n\\&{escaped}\n"
    pdf = subprocess.run(["groff", "-Kutf8", "-Tpdf", "-P-p1.2i,8i"], input=source.encode(), check=True, capture_output=True).stdout
    (folder / "set.pdf").write_bytes(pdf)
    subprocess.run(["pdftoppm", "-r", "150", "-png", f"{folder}/set.pdf", f"{folder}/set"], check=True)
    pages = sorted(folder.glob("set-*.png"))
    assert len(pages) == len(samples), (len(pages), len(samples))
    return [(crop(Image.open(page).convert("RGB"), "typeset"), text) for page, (text, _) in zip(pages, samples)]


def main():
    folder, seed, number = (given or default for given, default in zip((sys.argv[1:] + [None] * 3)[:3], (FOLDER, SEED, NUMBER)))
    folder, number = Path(folder), int(number)
    random.seed(int(seed))
    texts = {"form": [person, date, code, single], "receipt": [thing, price, date], "label": [code, thing, person], "screen": [thing, person, code, price],
             "hand": [person, thing, date, price], "math": [expression], "single": [single], "typeset": [person, thing, code, price]}
    samples = [(random.choice(texts[group])(), group) for group in (list(texts)[i % len(texts)] for i in range(number))]
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        by_browser = iter(browser([s for s in samples if s[1] != "typeset"], temporary))
        by_typesetter = iter(typesetter([s for s in samples if s[1] == "typeset"], temporary))
        for i, (_, group) in enumerate(samples):
            picture, text = next(by_typesetter if group == "typeset" else by_browser)
            wear = random.choice(["none", "print and scan", "photo", "low resolution", "faint"] + ["fax"] * (picture.height > 40 and group not in ("label", "hand")))
            arguments = WEAR[wear].format(tilt=round(random.uniform(-1.5, 1.5), 2), angle=random.randint(0, 180)).split()
            name = f"{i:04}.{'jpg' if '-quality' in arguments else 'png'}"
            picture.save(temporary / "clean.png")
            ground = "#%02x%02x%02x" % picture.getpixel((1, 1))
            subprocess.run(["convert", str(temporary / "clean.png"), "-background", ground, *arguments, "-strip", *([] if name.endswith("jpg") else ["-colors", "32"]),
                            str(folder / name)], check=True)
            rows.append((name, text, group, "test"))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        table.writerows([("image_path", "label", "source", "split"), *rows])
    print(f"{len(rows)} pictures in {folder}")


if __name__ == "__main__":
    main()
