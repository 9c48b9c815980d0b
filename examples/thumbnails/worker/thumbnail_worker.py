"""The worker: makes thumbnails, and knows nothing of HTTP.

celery -A thumbnail_worker:celery_app worker -B

Pictures named without data are read from THUMBNAIL_INBOX (default: ./inbox); thumbnails are written to
THUMBNAIL_DIR/<job id> (default: ./thumbnails).
"""

import asyncio
import io
import os
from pathlib import Path
from uuid import UUID

from celery import Celery
from PIL import Image, ImageOps, UnidentifiedImageError
from thumbnail_models import MAKE_THUMBNAILS, Picture, Thumbnail, ThumbnailRequest, ThumbnailResult

from async_endpoints_celery import AsyncContext, AsyncEndpoints, JobFailed

INBOX = Path(os.environ.get("THUMBNAIL_INBOX", "inbox"))
OUTPUT = Path(os.environ.get("THUMBNAIL_DIR", "thumbnails"))
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
#: A small file can unpack to gigabytes of pixels.
MAX_PIXELS = 50_000_000

celery_app = Celery("thumbnails", broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
endpoints = AsyncEndpoints(celery_app)


@endpoints.handler(MAKE_THUMBNAILS, timeout_seconds=300)
async def make_thumbnails(context: AsyncContext[ThumbnailRequest]) -> ThumbnailResult:
    """Makes thumbnails of several sizes of each picture."""
    request = context.request
    made: list[Thumbnail] = []
    for number, picture in enumerate(request.pictures, 1):
        # Pillow computes: in a thread, so that the event loop stays free and a cancel arrives at once.
        made += await asyncio.to_thread(thumbnails_of, picture, request.sizes, context.job_id)
        await context.report_progress(100 * number / len(request.pictures), f"{picture.name} done")
    return ThumbnailResult(thumbnails=made)


def thumbnails_of(picture: Picture, sizes: list[int], job_id: UUID) -> list[Thumbnail]:
    """Writes the thumbnails of one picture, and says what they are.

    Raises:
        JobFailed: the picture is missing, or is none.
    """
    image, extension = open_picture(picture)
    directory = OUTPUT / str(job_id)
    directory.mkdir(parents=True, exist_ok=True)
    stem = picture.name.rpartition(".")[0] or picture.name
    made = []
    for size in sorted(set(sizes)):
        small = image.copy()
        small.thumbnail((size, size))  # the longer side; never enlarged
        path = directory / f"{stem}-{size}{extension}"
        small.save(path)
        made.append(
            Thumbnail(
                picture=picture.name,
                file=str(path.relative_to(OUTPUT)),
                width=small.width,
                height=small.height,
                bytes=path.stat().st_size,
            )
        )
    return made


def open_picture(picture: Picture) -> tuple[Image.Image, str]:
    """The picture, upright, and the file name extension for its thumbnails."""
    try:
        source = io.BytesIO(picture.data) if picture.data is not None else inbox_path(picture.name).open("rb")
        with source, Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise JobFailed("PICTURE_TOO_LARGE", f"{picture.name} has more than {MAX_PIXELS} pixels")
            upright = ImageOps.exif_transpose(image)
            if image.format in FORMATS:
                return upright, FORMATS[image.format]
            return upright.convert("RGBA"), ".png"
    except FileNotFoundError:
        raise JobFailed("PICTURE_NOT_FOUND", f"there is no {picture.name} in the inbox") from None
    except Image.DecompressionBombError:
        raise JobFailed("PICTURE_TOO_LARGE", f"{picture.name} has more than {MAX_PIXELS} pixels") from None
    except (UnidentifiedImageError, SyntaxError, OSError) as error:  # what Pillow says of broken files
        raise JobFailed("NOT_A_PICTURE", f"{picture.name} cannot be read as a picture: {error}") from error


def inbox_path(name: str) -> Path:
    """The file called `name` in the inbox: a link in there does not lead out of it."""
    path = (INBOX / name).resolve()
    if not path.is_relative_to(INBOX.resolve()):
        raise FileNotFoundError(name)
    return path
