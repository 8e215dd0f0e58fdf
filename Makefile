# The front door; `make` alone lists all targets. Recipes call scripts, each of which can also be run by hand.
#
#   BASE=dlc|public|local    the base of the images (docker-bake.hcl); demo and test use local
#   REGISTRY=prefix          put before the tags that build and push use

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help engine env wheels build push pin lock demo compose drill test check lint format clean clean/runs

export BASE ?= dlc
export REGISTRY ?=
export TARGET ?= local
demo compose drill test test/%: export BASE = local

help: ## this list
	@sh scripts/help.sh $(firstword $(MAKEFILE_LIST))

## See it work
demo: env ## from a bare machine to vectors: engine, image, a real embedding job, a search in its output
	@bash demo/run.sh
compose: env ## the demo's job with input and output on a local S3 server (after make demo)
	@bash compose/run.sh
train/%: env ## run images/NAME/job.yaml with the launcher (TARGET=local, ssh://user@host or sagemaker; ARGS=--yes)
	@bash scripts/train.sh $* $(ARGS) || { status=$$?; [ $$status = 4 ] || exit $$status; \
		echo "train: not finished: the job was stopped, or this command was interrupted; the lines above say how it stands" >&2; }
drill: env ## rehearse spot interruptions of an image and count the lost work (IMAGE=embed)
	@bash scripts/drill.sh $(or $(IMAGE),embed) $(ARGS)

## Build
engine: ## install a Docker engine with buildx and compose v2 if there is none
	@bash scripts/engine.sh
env: ## the host's Python tools: .build/tools and .venv
	@bash scripts/env.sh
wheels: ## fetch the wheels that images install, for BASE's Python
	@bash scripts/build.sh --wheels
build: ## build every image
	@bash scripts/build.sh
build/%: ## build one image, or the local base
	@bash scripts/build.sh $*
push: ## build every image and push it to REGISTRY
	@bash scripts/build.sh --push

## Test
test: ## run all tests but the slow ones; no GPU and no AWS account needed
	@bash scripts/test.sh
test/%: ## one room: fast, slow, shared, launch, repo, contract (IMAGE=embed for one image), or an image's name
	@bash scripts/test.sh $*
check: lint ## lint and the fast tests
	@bash scripts/test.sh fast
lint: ## ruff, mypy, shellcheck
	@bash scripts/lint.sh
format: ## fix what ruff can fix
	@bash scripts/lint.sh --fix
bench/%: env ## run benchmarks/NAME.py
	@bash scripts/bench.sh $* $(ARGS)

## Maintain
new/%: env ## make an image from the template (KIND=job for one that does not train)
	@bash scripts/new.sh $* $(KIND)
lock: ## resolve every lock again (ARGS=--upgrade for newer versions)
	@bash scripts/lock.sh $(ARGS)
pin: env ## write the digests of the AWS base images into docker-bake.hcl
	@.venv/bin/python scripts/pin.py
clean: ## remove .build, .venv and caches; runs/ and images stay
	@bash scripts/clean.sh
clean/runs: ## remove runs/: trained models, checkpoints and the data of demo and training
	@bash scripts/clean.sh runs
