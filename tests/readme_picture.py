"""Draw .github/reads.png: images of tests/foreign and what the shipped weights read in them."""

from conftest import ROOT

from crnn import contact_sheet, load_checkpoint, read_labels
from inference_crnn import recognize


def main():
    """Twenty images, chosen by chance, their readings in green or, where wrong, in red."""
    rows = read_labels(ROOT / "tests" / "foreign" / "labels.csv")
    rows = rows[rows.label.str.len() < 20].sample(20, random_state=0)
    paths = [ROOT / "tests" / "foreign" / path for path in rows.image_path]
    model = load_checkpoint(ROOT / "ocr_crnn_model" / "pretrained.pth")
    cells = []
    for path, label, reading in zip(paths, rows.label, recognize(paths, model)):
        colour = "#007020" if reading.text == label else "#c00000"
        cells.append((path, [(reading.text, colour)]))
    contact_sheet(ROOT / ".github" / "reads.png", cells, columns=4)


if __name__ == "__main__":
    main()
