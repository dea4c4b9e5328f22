"""Draw .github/reads.png for the README: pictures of tests/foreign, chosen by chance, and what the shipped weights read in them.

    python tests/readme_picture.py
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

COLUMNS, ROWS = 4, 5  # pictures across and down
WIDTH, HEIGHT = 230, 78  # of one cell, in pixels


def main():
    from crnn import load_checkpoint, read_labels, whole_file
    from inference_crnn import recognize

    rows = read_labels(ROOT / "tests" / "foreign" / "labels.csv")
    rows = rows[rows.label.str.len() < 20].sample(COLUMNS * ROWS, random_state=0)
    paths = [ROOT / "tests" / "foreign" / path for path in rows.image_path]
    readings = recognize(paths, load_checkpoint(ROOT / "ocr_crnn_model" / "pretrained.pth"))
    font = ImageFont.truetype(str(ROOT / "myFonts" / "DejaVuSans.ttf"), 15)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, ROWS * HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (path, label, reading) in enumerate(zip(paths, rows.label, readings)):
        x, y = i % COLUMNS * WIDTH + 8, i // COLUMNS * HEIGHT + 6
        with Image.open(path) as image:
            picture = ImageOps.contain(image.convert("RGB"), (WIDTH - 16, 38))
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline="#cccccc")
        draw.text((x, y + 44), reading.text, font=font, fill="#007020" if reading.text == label else "#c00000")
    with whole_file(ROOT / ".github" / "reads.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
