from editlib.cli import main

main()
