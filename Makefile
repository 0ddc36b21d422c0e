# make reproduce        recompute the main table on the embedded world (2,000 videos), then redraw every table and figure
# make test             notebooks, stored outputs, pytest
# make reproduce-full   the embedded world with 10,000 videos, and flickr8k where GRNB_DATA holds it, with the studies of tokenizers and of GRDR; resumable
# make clean            remove the environment and what tools leave behind; results and figures stay
#
# PYTHON    the Python 3.11 that makes the environment         make PYTHON=python3 test
# PIPFLAGS  passed to pip, for instance another package index  make PIPFLAGS='--index-url ...' test
# WORKERS   notebooks tested at a time                         make WORKERS=1 test

PYTHON   ?= python3.11
PIPFLAGS ?=
BIN      := $(CURDIR)/.venv/bin
FIGURES  := $(sort $(wildcard nbs/3[0-9]_figure*.ipynb) $(wildcard nbs/4[0-9]_paper*.ipynb))

export PATH := $(BIN):$(PATH)
export PYTHONHASHSEED := 0
export SOURCE_DATE_EPOCH := 0
export MPLBACKEND := agg
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: reproduce reproduce-full figures test clean help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

reproduce: .venv/.done
	grnb reproduce
	@$(MAKE) --no-print-directory figures

reproduce-full: .venv/.done
	grnb reproduce --full
	grnb reproduce --study tokenizers
	grnb reproduce --study grdr
	$(if $(GRNB_DATA),grnb reproduce --task flickr8k && grnb reproduce --task flickr8k --study tokenizers && grnb reproduce --task flickr8k --study grdr,@echo "GRNB_DATA is not set: the stored flickr8k results stay as they are")
	@$(MAKE) --no-print-directory figures

figures: .venv/.done
	$(if $(FIGURES),python tests/run_notebooks.py $(FIGURES),grnb report)

test: .venv/.done
	tests/check.sh

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: it is the largest download, and decides between the CPU and the CUDA build
.venv/.done: settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "grnb needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	python -m pip install -q $(PIPFLAGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	python -m pip install -q $(PIPFLAGS) -c constraints.txt -e '.[cpu,dev]'
	@touch $@
