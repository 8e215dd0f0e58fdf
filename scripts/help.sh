#!/bin/sh
# Print the help of a Makefile: the text after ## on each target's line.
awk -F ':.*## ' '
    /^## /              { printf "\n%s\n", substr($0, 4) }
    /^[a-zA-Z%\/_-]+:.*## / { sub(/%/, "NAME", $1); printf "  make %-16s %s\n", $1, $2 }
' "$1"
