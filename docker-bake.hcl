# The build graph, with every base-image pin.
#
#   make build BASE=local                  # what people call: fetches wheels first, then bakes
#   docker buildx bake --print             # prints the graph
#
# An image exists because images/<name>/Dockerfile exists. Make passes that list as IMAGES. The default below is the same
# list for a bare `docker buildx bake`; tests/repo fails if the two differ.

variable "IMAGES" { default = "aura,brain-to-text,embed,finetune,multinode" }

# dlc: AWS's training images from its account registry. public: the public gallery, no AWS account.
# local: images/base, for machines that can pull neither.
variable "BASE" { default = "dlc" }

variable "REGISTRY" { default = "" } # "123456789012.dkr.ecr.us-east-1.amazonaws.com/", with or without the slash
variable "VERSION" { default = "0.0.0" } # Make reads the file VERSION
variable "REVISION" { default = "" }
variable "AWS_REGION" { default = "us-east-1" }
variable "DLC_ACCOUNT" { default = "763104351884" } # four regions differ: af-south-1 626614931356, eu-south-1 692866216735, me-south-1 217643126080, ap-east-1 871362719292

# ------------------------------------------------------------------------------------------------- pins
# AWS rebuilds a tag in place about weekly; only a digest is stable. `make pin` writes the digests.

variable "HUGGINGFACE_REPOSITORY" { default = "huggingface-pytorch-training" }
variable "HUGGINGFACE_TAG" { default = "2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04" }
variable "HUGGINGFACE_DIGEST" { default = "" }

variable "PYTORCH_REPOSITORY" { default = "pytorch" }
variable "PYTORCH_TAG" { default = "2.13.0-cu133-amzn2023-sagemaker" }
variable "PYTORCH_DIGEST" { default = "" }

variable "PUBLIC_REPOSITORY" { default = "public.ecr.aws/deep-learning-containers/pytorch" }
variable "PUBLIC_TAG" { default = "2.13.0-cu133-amzn2023-sagemaker" }
variable "PUBLIC_DIGEST" { default = "" }

# The images on the Hugging Face training image; all others are on the PyTorch one.
variable "ON_HUGGINGFACE" { default = "embed,finetune" }

# -------------------------------------------------------------------------------------------- functions

function "pinned" {
  params = [repository, tag, digest]
  result = "docker-image://${repository}:${tag}${digest == "" ? "" : "@${digest}"}"
}

function "dlc" {
  params = [repository]
  result = "${DLC_ACCOUNT}.dkr.ecr.${AWS_REGION}.amazonaws.com/${repository}"
}

function "base_of" {
  params = [image]
  result = (
    BASE == "local" ? "target:base" :
    BASE == "public" ? pinned(PUBLIC_REPOSITORY, PUBLIC_TAG, PUBLIC_DIGEST) :
    contains(split(",", ON_HUGGINGFACE), image) ? pinned(dlc(HUGGINGFACE_REPOSITORY), HUGGINGFACE_TAG, HUGGINGFACE_DIGEST) :
    pinned(dlc(PYTORCH_REPOSITORY), PYTORCH_TAG, PYTORCH_DIGEST)
  )
}

# Python of the base: Debian 12 has 3.11, AWS's images 3.12.
function "wheels" {
  params = [name]
  result = ".build/wheels/${name}-${BASE == "local" ? "py311" : "py312"}"
}

function "tags" {
  params = [name]
  result = [for tag in(BASE == "local" ? ["local"] : [VERSION]) : "${REGISTRY == "" ? "" : "${trimsuffix(REGISTRY, "/")}/"}estiba/${name}:${tag}"]
}

# ---------------------------------------------------------------------------------------------- targets

# SageMaker refuses an image index, which an attestation would make of an image where the engine has the containerd store.
variable "NO_ATTESTATION" { default = ["type=provenance,disabled=true", "type=sbom,disabled=true"] }

group "default" { targets = ["image"] }
group "tests" { targets = ["image-test"] }

# What all images have in common; images/common.Dockerfile says what, and why in which order.
target "common" {
  name       = "${image}-common"
  matrix     = { image = split(",", IMAGES) }
  context    = "."
  dockerfile = "images/common.Dockerfile"
  contexts   = { base = base_of(image), wheels = wheels(image) }
  args = {
    IMAGE                 = image
    PACKAGE               = replace(image, "-", "_")
    ESTIBA_VERSION        = VERSION
    ESTIBA_IMAGE_REVISION = REVISION
  }
}

target "image" {
  name       = image
  matrix     = { image = split(",", IMAGES) }
  context    = "."
  dockerfile = "images/${image}/Dockerfile"
  contexts   = { common = "target:${image}-common" }
  tags       = tags(image)
  attest     = NO_ATTESTATION
  labels = {
    "estiba.image"                       = image # ours, so that pruning old builds leaves other people's images alone
    "org.opencontainers.image.title"     = "estiba/${image}"
    "org.opencontainers.image.version"   = VERSION
    "org.opencontainers.image.revision"  = REVISION
    "org.opencontainers.image.base.name" = BASE == "local" ? "estiba/base:local" : replace(base_of(image), "docker-image://", "")
  }
}

# The same image with pytest and its own tests in it; never pushed.
target "image-test" {
  name       = "${image}-test"
  matrix     = { image = split(",", IMAGES) }
  context    = "."
  dockerfile = "tests/images/Dockerfile"
  contexts   = { image = "target:${image}", base = base_of(image), wheels = wheels("${image}-test") }
  args       = { IMAGE = image }
  tags       = ["estiba/${image}-test:local"]
  attest     = NO_ATTESTATION
}

# The local base; images/base/rootfs.sh makes its file systems.
target "base" {
  context = "images/base"
  contexts = {
    rootfs       = "docker-image://estiba/rootfs:bookworm"
    rootfs-build = "docker-image://estiba/rootfs-build:bookworm"
    wheels       = ".build/wheels/base-py311"
  }
  tags   = ["estiba/base:local"]
  attest = NO_ATTESTATION
  labels = {
    "estiba.image"                     = "base"
    "org.opencontainers.image.title"   = "estiba/base"
    "org.opencontainers.image.version" = VERSION
  }
}
