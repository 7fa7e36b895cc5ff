"""MiMo-V2-Flash: six domain teachers and the student itself, merged by MOPD; the loop closes.

Source: MiMo-V2-Flash, arXiv 2601.02780, section 4.
