# The front door; `make` alone prints what there is. Recipes call scripts, so that each can be run by hand as well.
#
#   BASE=dlc|public|local    what images stand on (docker-bake.hcl); demo and test use local
#   REGISTRY=prefix          of the tags that build and push use

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help engine env wheels build push pin lock demo compose drill test check lint format clean

export BASE ?= dlc
export REGISTRY ?=
export TARGET ?= local
demo compose drill test test/%: export BASE = local

help: ## this list
	@sh scripts/help.sh $(firstword $(MAKEFILE_LIST))

## See it work
demo: env ## from nothing to vectors: engine, images, a real embedding job, what came out
	@bash demo/run.sh
compose: env ## the demo's job over a local S3 server, input and output on s3:// (after make demo)
	@bash compose/run.sh
train/%: env ## run images/NAME/job.yaml with the launcher (TARGET=local, ssh://user@host or sagemaker; ARGS=--yes)
	@bash scripts/train.sh $* $(ARGS)
drill: env ## rehearse spot interruptions on one image and count the lost work (IMAGE=embed)
	@bash scripts/drill.sh $(or $(IMAGE),embed) $(ARGS)

## Build
engine: ## a Docker engine with buildx and compose v2, installed if there is none
	@bash scripts/engine.sh
env: ## the host's Python tools: .build/tools and .venv
	@bash scripts/env.sh
wheels: ## fetch what images install, for BASE's Python
	@bash scripts/build.sh --wheels
build: ## every image
	@bash scripts/build.sh
build/%: ## one image, or base
	@bash scripts/build.sh $*
push: ## every image, built and pushed to REGISTRY
	@bash scripts/build.sh --push

## Test
test: ## everything that needs neither GPU nor AWS
	@bash scripts/test.sh
test/%: ## one room: fast, shared, launch, repo, contract, or an image's name
	@bash scripts/test.sh $*
check: lint ## lint and the fast tests
	@bash scripts/test.sh fast
lint: ## ruff, mypy, shellcheck
	@bash scripts/lint.sh
format: ## repair what ruff can repair
	@bash scripts/lint.sh --fix
bench/%: env ## run benchmarks/NAME.py
	@bash scripts/bench.sh $* $(ARGS)

## Keep
lock: ## write every lock again (ARGS=--upgrade for newer versions)
	@bash scripts/lock.sh $(ARGS)
pin: env ## fill in the digests of the AWS base images
	@.venv/bin/python scripts/pin.py
clean: ## remove what make made here: .build, .venv, runs, caches (images stay)
	@rm -rf .build .venv runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
