from pix2rep.cli import main

if __name__ == "__main__":
    main()
