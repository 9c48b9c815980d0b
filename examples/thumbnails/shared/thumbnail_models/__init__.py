"""What the web process and the workers agree on: the name of the job, its request and its result."""

from typing import Annotated, Self

from pydantic import Base64Bytes, BaseModel, Field, StringConstraints, model_validator

MAKE_THUMBNAILS = "MakeThumbnails"

#: A file's name, never a path: no slash, no leading dot.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}$")]
#: The longer side of a thumbnail in pixels.
Size = Annotated[int, Field(ge=16, le=2048)]


class Picture(BaseModel):
    """A picture: its bytes as base64, or only the name of a file in the workers' inbox directory."""

    name: FileName
    data: Base64Bytes | None = None


class ThumbnailRequest(BaseModel):
    pictures: list[Picture] = Field(min_length=1, max_length=50)
    sizes: list[Size] = Field(default=[128, 512], min_length=1, max_length=5)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [picture.name.rpartition(".")[0] or picture.name for picture in self.pictures]
        if len(set(names)) < len(names):
            raise ValueError("two pictures have the same name, and so would their thumbnails")
        return self


class Thumbnail(BaseModel):
    picture: str
    file: str
    width: int
    height: int
    bytes: int


class ThumbnailResult(BaseModel):
    thumbnails: list[Thumbnail]
