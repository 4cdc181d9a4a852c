"""Distillation is a method now: python train.py --method distill. This keeps the old command."""

import sys

import train


def main():
    sys.argv[1:1] = ["--method", "distill"]
    train.main()


if __name__ == "__main__":
    main()
